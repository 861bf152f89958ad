"""Writes a corpus of synthetic documents to disk, drawn once by several processes and read by any number of runs."""

import collections
import concurrent.futures
import functools
import hashlib
import io
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.document import draw_document
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.data.synthetic.values import SPLITS
from alignvlm_jax.data.workers import can_start_workers
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import Lease
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.progress import progress_bar

FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "id": tfds.features.Text(),
    "source": tfds.features.Text(),  # the family
    "font": tfds.features.Text(),
    "transcription": tfds.features.Text(),
    "questions": tfds.features.Sequence(tfds.features.Text()),
    "answers": tfds.features.Sequence(tfds.features.Text()),
}

_KIND = "synthetic documents"
_DOCUMENTS_PER_CALL = 64
_DOCUMENTS_PER_PROCESS = 1_000  # fewer are drawn faster than another process starts
_MAX_PROCESSES = 8


def build_corpus(
    folder: str | Path,
    *,
    seed: int,
    sizes: Mapping[str, int],
    progress: bool = True,
    processes: int | None = None,
) -> Path:
    """Writes a data set of synthetic documents, for `store.open_dataset(folder, split)`.

    An existing corpus with the same parameters is kept; one with other parameters is replaced. The records do not
    depend on the number of processes.

    Args:
      folder: folder of the data set.
      seed: seed of the documents.
      sizes: number of documents of each split.
      progress: whether to show a progress bar.
      processes: number of drawing processes; None uses one per CPU core, and fewer for a small corpus.

    Raises:
      UserError: if a split or size is not valid, or the folder holds another kind of data set.
    """
    _check_sizes(sizes)
    recipe = {"kind": _KIND, "seed": seed, "sizes": dict(sizes), "drawing": _fingerprint(seed)}
    drawings = {split: (functools.partial(draw_records, seed, split), size) for split, size in sizes.items()}
    return write_corpus(folder, recipe, drawings, description=__doc__, progress=progress, processes=processes)


def write_corpus(
    folder: str | Path,
    recipe: Mapping[str, Any],
    drawings: Mapping[str, tuple[Callable[[int, int], list[dict[str, Any]]], int]],
    *,
    description: str,
    progress: bool = True,
    processes: int | None = None,
) -> Path:
    """Writes a data set of drawn documents of any kind. Keeps an existing one with the same recipe.

    Args:
      folder: folder of the data set. Existing contents must be of the same kind, and are replaced.
      recipe: all parameters that the records depend on, as JSON values; "kind" names the kind of data set. It is stored
        as metadata.
      drawings: for each split, a function of a range (first, one after the last) that returns records, and the number
        of records. Other processes may call the function.
      description: description of the data set.
      progress: whether to show a progress bar.
      processes: number of drawing processes; None uses one per CPU core, and fewer for a small corpus.

    Raises:
      InUseError: if another process is writing the same data set.
      UserError: if the folder holds another kind of data set.
    """
    folder = Path(folder)
    if _is_written(folder, recipe):
        return folder
    with one_writer(folder, beside=True) as lease:
        # Another process may have written it in the meantime. One with another recipe is replaced.
        if not _is_written(folder, recipe):
            shutil.rmtree(folder, ignore_errors=True)
            _write(folder, recipe, drawings, description, progress, processes, lease)
    return folder


def _is_written(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Returns whether a folder holds the corpus; refuses a folder that must not be replaced."""
    if not store.is_occupied(folder):
        return False
    metadata = store.read_metadata(folder)
    if metadata != recipe and metadata.get("kind") != recipe["kind"]:
        raise UserError(f"{folder} holds another kind of data set: choose another folder for {recipe['kind']}")
    return metadata == recipe


def _write(
    folder: Path,
    recipe: Mapping[str, Any],
    drawings: Mapping[str, tuple[Callable[[int, int], list[dict[str, Any]]], int]],
    description: str,
    progress: bool,
    processes: int | None,
    lease: Lease,
) -> None:
    """Draws the documents and writes the data set."""
    total = sum(size for _, size in drawings.values())
    processes = processes or min(os.cpu_count() or 1, _MAX_PROCESSES, max(1, total // _DOCUMENTS_PER_PROCESS))
    name = recipe["kind"].replace(" ", "_")
    with (
        progress_bar(desc="drawing documents", total=total, unit="page", mininterval=0.5, show=progress) as bar,
        _make_executor(processes) as executor,
    ):
        splits = {split: _records(executor, draw, size, processes, bar) for split, (draw, size) in drawings.items()}
        store.write_dataset(
            folder, FEATURES, splits, name=name, description=description, metadata=dict(recipe), check=lease.check
        )


def _check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises a `UserError` if a split or a size is not valid."""
    for split, size in sizes.items():
        if split not in SPLITS:
            raise UserError(f"sizes: no split {split!r} of synthetic documents: expected one of {', '.join(SPLITS)}")
        if size < 1:
            raise UserError(f"sizes.{split}: expected at least one document, got {size}")


def _fingerprint(seed: int) -> str:
    """Returns a hash of the first documents, so that a change of the drawing code replaces an existing corpus."""
    digest = hashlib.sha256()
    for index in range(16):
        document = draw_document(seed, "train", index, render=False)
        digest.update(repr((document.font, document.transcription, document.questions)).encode())
        digest.update(repr([round(edge) for glyph in document.glyphs for edge in glyph[1:]]).encode())
    return digest.hexdigest()[:16]


class _InlineExecutor(concurrent.futures.Executor):
    """Runs each task in this process as soon as it is submitted."""

    def submit(self, function, /, *arguments):
        """Calls the function and returns its result as a finished future."""
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def _make_executor(processes: int) -> concurrent.futures.Executor:
    """Returns an executor for drawing."""
    if processes == 1 or not can_start_workers("one process draws all documents"):
        return _InlineExecutor()
    # Spawned, because a fork of a process in which JAX has started its threads can hang.
    return concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def _records(
    executor: concurrent.futures.Executor,
    draw: Callable[[int, int], list[dict[str, Any]]],
    size: int,
    processes: int,
    bar: tqdm,
) -> Iterator[dict[str, Any]]:
    """Yields the documents of a split in order. A few batches are drawn ahead of the writer."""
    starts = iter(range(0, size, _DOCUMENTS_PER_CALL))
    pending = collections.deque()
    while True:
        # Keep two batches per process submitted, and read the results in order.
        while len(pending) < 2 * processes and (start := next(starts, None)) is not None:
            pending.append(executor.submit(draw, start, min(start + _DOCUMENTS_PER_CALL, size)))
        if not pending:
            return
        for record in pending.popleft().result():
            yield record | {"image": io.BytesIO(record["image"])}
            bar.update()
