"""Answers to single questions from compiled programs and weights that an earlier command has stored.

Loading a small model, tracing its program and importing what both need takes much longer than an answer. `alignvlm ask`
therefore stores what it made for its first answer, in the user's cache folder (`commands/compilation_cache.py`), which
nobody else can write:

    FOLDER/KEY/model       sizes of the model, its tiling, and its weights as the program takes them
    FOLDER/KEY/8a0f...     a compiled program for one shape of prompts, as JAX serializes it

The next question about a page of similar size needs only JAX, the tokenizer and these files, and the same program gives
the same answer. KEY is a hash of everything that they depend on: all files of the model's folder, the code of this
package, the versions of Python, JAX and Flax, and the variables that JAX and XLA read. The FOLDER belongs to one kind
of CPU and one user. An entry that is missing or damaged means only that the model is loaded.

Only models in exported folders of at most 32 MB are stored, and only on a CPU.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable

import alignvlm_jax
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.inference.answers import AnswerText
from alignvlm_jax.inference.prompts import (
    Batch,
    Geometry,
    ImageSource,
    Prompt,
    PromptMaker,
    TrainingRecord,
    first_answer,
    pad_prompts,
)
from alignvlm_jax.interop.tokenizer import read_exported_tokenizer

# Weights in bfloat16 take twice as many bytes here, in float32: four models and their programs are at most 0.4 GB.
MAX_BYTES = 32_000_000
_MAX_MODELS = 4
_MAX_PROGRAMS = 16
_PREFIXES = ("JAX_", "XLA_", "TF_XLA_", "NPROC")
_MODEL_FILE = "model"


class Facts(NamedTuple):
    """Content of the file of a model.

    Attributes:
      geometry: sizes that prompts depend on.
      tiling: settings of the tiles.
      training: facts about the training of the weights.
      notes: sentences for the user about files that were not read.
      arrays: the weights, in the order in which the programs take them.
    """

    geometry: Geometry
    tiling: TilingConfig
    training: TrainingRecord
    notes: tuple[str, ...]
    arrays: list[np.ndarray]


def entry_of(folder: Path, model: Path, environ: Mapping[str, str]) -> Path | None:
    """Returns the folder of a model's entry, which need not exist; None if the model is not of a kind that is stored.

    Args:
      folder: folder of all entries.
      model: folder of the model.
      environ: the environment.
    """
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []
    if not is_alignvlm_folder(model) or sum(path.stat().st_size for path in files) > MAX_BYTES:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    package = Path(alignvlm_jax.__file__).parent
    for path, status in _python_files(package):
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    versions = [sys.version, jax.__version__, jax.lib.__version__, importlib.metadata.version("flax")]
    variables = sorted((name, value) for name, value in environ.items() if name.startswith(_PREFIXES))
    digest.update(repr((versions, variables)).encode())
    return folder / digest.hexdigest()[:32]


class PreparedModel(PromptMaker):
    """A model in an entry.

    Attributes:
      entry: folder of the entry.
      facts: content of the file of the model.
    """

    def __init__(self, entry: Path, model: Path):
        """Opens the entry of an exported folder.

        Raises:
          OSError: if there is no entry.
          ValueError: if it is damaged.
        """
        self.entry: Path = entry
        self.facts: Facts = _read(entry / _MODEL_FILE)
        super().__init__(self.facts.geometry, read_exported_tokenizer(model), self.facts.tiling, self.facts.training)

    def ask(self, image: ImageSource | Sequence[ImageSource], question: str, *, max_new_tokens: int) -> AnswerText:
        """Answers a question as `Reader.ask` does.

        Raises:
          OSError: if there is no program for a prompt of this shape.
          ValueError: if the program is damaged.
        """
        prompt = self.prompts(image, [question])[0]
        batch = batch_of(prompt, self.tiling.tile_size, self.tokenizer.pad_id)
        program = _load_program(self.entry / _shape_key(batch, max_new_tokens))
        os.utime(self.entry)
        ids = np.asarray(program(self.facts.arrays, batch))[0]
        return self.answer_text(prompt, first_answer(ids, self.tokenizer.end_ids), max_new_tokens)


def is_usable() -> bool:
    """Returns whether the programs can run here: JAX's only device is the CPU."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def store(entry: Path, facts: Facts, program: jax.stages.Compiled, batch: Batch, max_new_tokens: int) -> None:
    """Stores a program and its model. Nothing happens if the folder cannot be written.

    Args:
      entry: folder of the entry.
      facts: facts about the model.
      program: program that takes the arrays of `facts` and a batch, and returns answers.
      batch: a batch that the program takes.
      max_new_tokens: maximum length of its answers.
    """
    # The entry is of use to later commands only, so this one continues without it.
    with contextlib.suppress(OSError):
        entry.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(entry / _shape_key(batch, max_new_tokens), serialize_executable.serialize(program))
        if not (entry / _MODEL_FILE).exists():
            _write(entry / _MODEL_FILE, facts)
        os.utime(entry)
        _keep_newest([path for path in entry.iterdir() if path.name != _MODEL_FILE], _MAX_PROGRAMS)
        _keep_newest(list(entry.parent.iterdir()), _MAX_MODELS)


def batch_of(prompt: Prompt, tile_size: int, pad_id: int) -> Batch:
    """Returns the batch of a single prompt."""
    return pad_prompts(prompt.views(), rows=prompt.num_views, tile_size=tile_size, pad_id=pad_id)


def _load_program(path: Path) -> jax.stages.Compiled:
    content = _read(path)
    try:
        return serialize_executable.deserialize_and_load(*content, execution_devices=jax.devices()[:1])
    except Exception as error:  # JAX and XLA document none
        raise ValueError(f"{path} cannot be loaded") from error


def _shape_key(batch: Batch, max_new_tokens: int) -> str:
    shapes = sorted((name, array.shape, str(array.dtype)) for name, array in batch.items())
    return hashlib.sha256(repr((shapes, max_new_tokens)).encode()).hexdigest()[:32]


def _python_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yields path and status of all Python files under a folder, in order of their paths."""
    for item in sorted(os.scandir(folder), key=lambda item: item.name):
        if item.is_dir():
            yield from _python_files(Path(item.path))
        elif item.name.endswith(".py"):
            yield item.path, item.stat()


def _write(path: Path, content: Any) -> None:
    """Writes a file with a digest of its content. Other processes see the complete file or none."""
    data = pickle.dumps(content, protocol=5)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(data).digest() + data)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _read(path: Path) -> Any:
    """Reads a file that `_write` has written.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is damaged.
    """
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged")
    return pickle.loads(memoryview(content)[32:])


def _keep_newest(paths: list[Path], number: int) -> None:
    """Removes all but the newest files or folders."""
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)[number:]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
