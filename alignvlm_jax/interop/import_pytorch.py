"""Imports a PyTorch folder as a checkpoint: the inverse of `export.py`.

    import_alignvlm("alignvlm-nano", "runs/back")

A folder written by `export_alignvlm` is imported without loss: weights (bit for bit), config, progress and history
equal those of the exported checkpoint.

Folders saved by `save_pretrained` after further training in PyTorch are read as well. They have no
`alignvlm_training.json`: the model and the tiling come from `config.json` and `processor_config.json`, and the rest of
the config from another config.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from alignvlm_jax.checkpoints.new_folder import new_folder
from alignvlm_jax.checkpoints.weights import fill_workdir
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import BackbonesConfig, ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.downloads.contents import describe_adapter
from alignvlm_jax.downloads.sources import model_source
from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, tables
from alignvlm_jax.interop.assemble import abstract_parameters
from alignvlm_jax.interop.export import PROCESSOR_FILE, TRAINING_FILE
from alignvlm_jax.interop.huggingface_config import read_language_config, read_vision_config
from alignvlm_jax.interop.start import load_config
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.interop.tensor_writer import DTYPES
from alignvlm_jax.interop.tokenizer import import_tokenizer, read_exported_tokenizer
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params

# Folders without `alignvlm_training.json` get the training stages of this config, which are the paper's.
DEFAULT_CONFIG = "alignvlm_1b.py"
_FROM_PYTORCH = "saved by PyTorch"


@ordinary_modes()
def import_alignvlm(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    base: ExperimentConfig | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Reads a folder and writes a checkpoint.

    Args:
      folder: contains config.json, safetensors, processor_config.json and a tokenizer; or a name on the Hub.
      out: workdir to create; it must be empty or not exist yet.
      dtype: dtype of the weights; None keeps the dtype of each tensor in the folder.
      mesh: devices that hold the weights during the import; None is the first device.
      base: source of settings that a folder without `alignvlm_training.json` lacks, such as stages.
      log: called with a sentence for each decision made during the import.

    Raises:
      UserError: if the folder is not an AlignVLM, its tensors do not fit its config (lists all problems), or `out` is
        not empty or cannot be written.
    """
    with new_folder(out) as scratch:
        content = read_alignvlm(folder, dtype=dtype, mesh=mesh, base=base)
        for note in content.notes:
            log(note)
        fill_workdir(
            scratch,
            content.config,
            content.params,
            content.tokenizer,
            history=content.history,
            progress=content.progress,
            page_scale=content.page_scale,
        )


@dataclasses.dataclass(frozen=True)
class AlignVLMFolder:
    """Content of an AlignVLM folder; see `write_checkpoint` for the fields. `notes` are sentences for the user."""

    config: ExperimentConfig
    params: Params
    tokenizer: ChatTokenizer
    progress: Progress
    history: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    page_scale: float | None = None


@ordinary_modes()
def read_alignvlm(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    base: ExperimentConfig | None = None,
) -> AlignVLMFolder:
    """Reads a folder; see `import_alignvlm` for arguments and errors."""
    folder = model_source(folder)
    config_json = _read_json(folder / "config.json")
    _refuse_other_models(folder, config_json)
    config, progress, history = _read_run(folder, config_json, base)
    tokenizer = _read_tokenizer(folder, config_json, config.model.language.vocab_size)
    with TensorFiles(folder) as files:
        params = _read_params(files, config.model, dtype, mesh)
    return AlignVLMFolder(config, params, tokenizer, progress, history, files.notes, _read_page_scale(folder))


def read_alignvlm_config(folder: str | Path) -> ExperimentConfig:
    """Returns the config that `read_alignvlm` would return, without reading weights."""
    folder = model_source(folder, with_weights=False)
    return _read_run(folder, _read_json(folder / "config.json"), None)[0]


def _refuse_other_models(folder: Path, config_json: dict[str, Any]) -> None:
    """Raises a `UserError` unless `config.json` describes a complete AlignVLM."""
    kind = config_json.get("model_type")
    if kind == "alignvlm":
        sections = ("vision_config", "text_config", "connector_config")
        missing = [section for section in sections if not isinstance(config_json.get(section), dict)]
        if missing:
            raise UserError(f"{folder}/config.json: it has no {', '.join(missing)}")
        return
    advice = ""
    if kind in ("llama", "siglip", "siglip_vision_model"):
        advice = f": a {kind} folder is a single backbone; `alignvlm import` builds an AlignVLM from two"
    raise UserError(f"{folder}/config.json: model_type is {kind!r}, expected 'alignvlm'{advice}")


def _read_run(
    folder: Path, config_json: dict[str, Any], base: ExperimentConfig | None
) -> tuple[ExperimentConfig, Progress, list[dict[str, Any]]]:
    """Returns the experiment that the weights belong to, its progress, and the history before it."""
    file = folder / TRAINING_FILE
    # An exported folder records its own config, progress and history.
    if file.is_file():
        training = _read_json(file)
        try:
            raw, history = training["config"], list(training["history"])
            progress = Progress(**training["meta"]["progress"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: not a file that `export_alignvlm` wrote ({error}); remove it") from error
        if "transformers_version" in config_json:
            # save_pretrained has written to the exported folder, so the weights may have been trained further.
            history.append({"what": "trained", "progress": training["meta"]["progress"], "config": raw})
            history.append({"what": _FROM_PYTORCH, "transformers": config_json["transformers_version"]})
            progress = Progress()
    # Any other folder takes the settings of `base`, except the backbones and the tokenizer that `base` started from.
    else:
        base = dataclasses.replace(
            base or load_config(DEFAULT_CONFIG), backbones=BackbonesConfig("random", "random"), tokenizer=None
        )
        # transformers 4 writes `torch_dtype`, transformers 5 `dtype`.
        stored = config_json.get("dtype") or config_json.get("torch_dtype") or "float32"
        dtype = "float32" if stored == "float32" else "bfloat16"
        raw = config_to_dict(base)
        for part in ("vision", "language"):
            raw["model"][part] |= {"dtype": dtype, "remat": "none"}
        raw["model"]["language"]["head_dim"] = None
        progress, history = Progress(), [{"what": _FROM_PYTORCH, "folder": folder.resolve().name}]
    # The folder's own files decide the model and the tiling in both cases.
    raw["model"] = _read_model(folder, config_json, raw["model"])
    raw["data"]["tiling"] = _read_tiling(folder, raw["data"]["tiling"] if file.is_file() else None)
    try:
        return config_from_dict(raw), progress, history
    except UserError as error:
        raise UserError(f"{folder}: config.json and {PROCESSOR_FILE} give an invalid config: {error}") from error


def _read_page_scale(folder: Path) -> float | None:
    """Returns the scale of the pages that the weights were trained on, which exported folders record."""
    file = folder / TRAINING_FILE
    return _read_json(file).get("page_scale") if file.is_file() else None


def _read_model(folder: Path, config_json: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Returns the model of `config.json` as a raw config; dtype and remat, which it lacks, are taken from `run`."""
    language = dataclasses.replace(
        read_language_config(folder, "text_config"),
        tie_word_embeddings=bool(config_json.get("tie_word_embeddings", False)),
    )
    model = {"connector": config_json["connector_config"], "newline": bool(config_json.get("newline", False))}
    for name, part in (("vision", read_vision_config(folder, "vision_config")), ("language", language)):
        model[name] = dataclasses.asdict(part) | {field: run[name][field] for field in ("dtype", "remat")}
    # PyTorch's config always has head_dim. In ours it is None if it follows from the other fields.
    if run["language"].get("head_dim") is None and language.head_width * language.num_heads == language.hidden_size:
        model["language"]["head_dim"] = None
    return model


def _read_tiling(folder: Path, default: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the raw tiling config of the image processor, or `default` if the folder has none."""
    if default is not None and not (folder / PROCESSOR_FILE).is_file():
        return default
    fields = {field.name: field.default for field in dataclasses.fields(TilingConfig)}
    image_processor = _read_json(folder / PROCESSOR_FILE).get("image_processor") or {}
    # Older exports have no `grid_side`, which was added with anyres_max_9.
    missing = [name for name in fields if name not in image_processor and name != "grid_side"]
    if missing:
        raise UserError(
            f"{folder / PROCESSOR_FILE}: its image_processor has no {', '.join(missing)}; copy the file from the "
            "folder that training started from, or save the processor with `processor.save_pretrained`"
        )
    return {name: image_processor.get(name, default) for name, default in fields.items()}


def _read_tokenizer(folder: Path, config_json: dict[str, Any], num_embeddings: int) -> ChatTokenizer:
    """Reads the tokenizer and checks that it fits the model.

    Raises:
      UserError: if it does not fit the model.
    """
    if (folder / TRAINING_FILE).is_file():
        tokenizer = read_exported_tokenizer(folder)
    else:
        image_token = _read_json(folder / PROCESSOR_FILE).get("image_token")
        tokenizer = import_tokenizer(folder, num_embeddings=num_embeddings, image_token=image_token).chat
    if tokenizer.vocab_size > num_embeddings:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model {num_embeddings}")
    if tokenizer.image_id != config_json.get("image_token_id"):
        raise UserError(
            f"{folder}: the tokenizer's image token has id {tokenizer.image_id}, config.json's is "
            f"{config_json.get('image_token_id')}: they belong to different models"
        )
    return tokenizer


def _read_params(files: TensorFiles, config: AlignVLMConfig, dtype: str | None, mesh: Mesh | None) -> Params:
    """Reads the weights. If `dtype` is None, each keeps the dtype of its tensor."""
    rows = tables.alignvlm(config)
    abstract = abstract_parameters(config, mesh=mesh, dtype=dtype or "float32")
    if dtype is None:
        # All layers of a stacked parameter have one dtype, so layer 0 stands for all of them.
        stored = {row.path: files.dtypes.get(row.key.format(layer=0)) for row in rows}
        leaves = flatten_dict(abstract, sep="/")
        abstract = unflatten_dict(
            {path: leaf.update(dtype=_kept_dtype(stored[path], leaf.dtype)) for path, leaf in leaves.items()}, sep="/"
        )
    unused = ("lm_head.",) if config.language.tie_word_embeddings else ()
    return convert.load_params(files, rows, abstract, source=files.folder, ignore=unused)


def _kept_dtype(stored: np.dtype | None, default: np.dtype) -> np.dtype:
    """Returns the dtype of a stored weight if checkpoints support it, or else `default`."""
    # `convert.py` converts other dtypes to the default, or refuses them.
    return stored if stored is not None and stored.name in DTYPES else default


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises a `UserError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if reason := describe_stub(path):
            raise UserError(f"{path} {reason}") from None
        if adapter := describe_adapter(path.parent):
            raise UserError(f"{path.parent}: {adapter}") from None
        raise UserError(f"{path.parent} is not an AlignVLM folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} {describe_stub(path) or f'is not JSON: {error}'}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content
