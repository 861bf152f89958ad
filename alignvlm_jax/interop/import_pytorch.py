"""A PyTorch folder as a checkpoint: the way back of `export.py`.

    import_alignvlm("alignvlm-nano", "runs/back")

Reads what `export_alignvlm` wrote, and gives the same checkpoint: weights bit by bit, config, progress and history.
Also reads what PyTorch's `save_pretrained` made of it after training went on there. Such a folder has no
`alignvlm_training.json`; model and tiling then come from `config.json` and `processor_config.json`, and the rest of the
config from another one.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from alignvlm_jax.checkpoints.new_folder import refuse_taken
from alignvlm_jax.checkpoints.weights import write_checkpoint
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import BackbonesConfig, ExperimentConfig
from alignvlm_jax.config.loading import load_config
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, tables
from alignvlm_jax.interop.assemble import abstract_parameters
from alignvlm_jax.interop.export import PROCESSOR_FILE, TRAINING_FILE
from alignvlm_jax.interop.huggingface_config import read_language_config, read_vision_config
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.interop.tensor_writer import DTYPES
from alignvlm_jax.interop.tokenizer import import_tokenizer
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params

# The paper's stages: what a folder that says nothing of training gets, so that the checkpoint can be trained.
DEFAULT_CONFIG = "alignvlm_1b.py"
_FROM_PYTORCH = "saved by PyTorch"


def import_alignvlm(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    base: ExperimentConfig | None = None,
) -> None:
    """Reads a folder and writes a checkpoint.

    Args:
      folder: holds config.json, safetensors, processor_config.json and a tokenizer.
      out: the workdir to make; it must not exist, or be empty.
      dtype: of the weights; None leaves each as it is in the folder.
      mesh: where the weights are put on their way; None is the first device.
      base: has what the folder does not say, such as stages, if it is without `alignvlm_training.json`.

    Raises:
      UserError: the folder is not an AlignVLM, or its tensors do not fit its config, all problems in one message; `out`
        is taken or cannot be written.
    """
    refuse_taken(out)
    found = read_alignvlm(folder, dtype=dtype, mesh=mesh, base=base)
    write_checkpoint(
        out, found.config, found.params, found.tokenizer, history=found.history, progress=found.progress
    )


@dataclasses.dataclass(frozen=True)
class AlignVLMFolder:
    """What a folder holds; `write_checkpoint` says what each is."""

    config: ExperimentConfig
    params: Params
    tokenizer: ChatTokenizer
    progress: Progress
    history: list[dict[str, Any]]


def read_alignvlm(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    base: ExperimentConfig | None = None,
) -> AlignVLMFolder:
    """Reads a folder; arguments and errors as for `import_alignvlm`."""
    folder = Path(folder)
    config_json = _read_json(folder / "config.json")
    _refuse_other_models(folder, config_json)
    config, progress, history = _read_run(folder, config_json, base)
    tokenizer = _read_tokenizer(folder, config_json, config.model.language.vocab_size)
    with TensorFiles(folder) as files:
        params = _read_params(files, config.model, dtype, mesh)
    return AlignVLMFolder(config, params, tokenizer, progress, history)


def read_alignvlm_config(folder: str | Path) -> ExperimentConfig:
    """What `read_alignvlm` finds the experiment to be, without its weights."""
    folder = Path(folder)
    return _read_run(folder, _read_json(folder / "config.json"), None)[0]


def _refuse_other_models(folder: Path, config_json: dict[str, Any]) -> None:
    kind = config_json.get("model_type")
    if kind == "alignvlm":
        sections = ("vision_config", "text_config", "connector_config")
        lost = [section for section in sections if not isinstance(config_json.get(section), dict)]
        if lost:
            raise UserError(f"{folder}/config.json: it has no {', '.join(lost)}")
        return
    advice = ""
    if kind in ("llama", "siglip", "siglip_vision_model"):
        advice = f": a {kind} folder is one backbone; tools/import_hf.py makes an AlignVLM of two"
    raise UserError(f"{folder}/config.json: model_type is {kind!r}, not 'alignvlm'{advice}")


def _read_run(
    folder: Path, config_json: dict[str, Any], base: ExperimentConfig | None
) -> tuple[ExperimentConfig, Progress, list[dict[str, Any]]]:
    """The experiment that the weights belong to, how far it got, and what came before."""
    file = folder / TRAINING_FILE
    if file.is_file():
        training = _read_json(file)
        try:
            raw, history = training["config"], list(training["history"])
            progress = Progress(**training["meta"]["progress"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: not as it was exported ({error}); remove it") from error
        if "transformers_version" in config_json:
            # save_pretrained has written into the exported folder: the weights may have moved on since our run.
            history.append({"what": "trained", "progress": training["meta"]["progress"], "config": raw})
            history.append({"what": _FROM_PYTORCH, "transformers": config_json["transformers_version"]})
            progress = Progress()
    else:
        base = dataclasses.replace(
            base or load_config(DEFAULT_CONFIG), backbones=BackbonesConfig("random", "random"), tokenizer=None
        )
        dtype = "float32" if config_json.get("dtype", "float32") == "float32" else "bfloat16"
        raw = config_to_dict(base)
        for part in ("vision", "language"):
            raw["model"][part] |= {"dtype": dtype, "remat": "none"}
        raw["model"]["language"]["head_dim"] = None
        progress, history = Progress(), [{"what": _FROM_PYTORCH, "folder": folder.resolve().name}]
    raw["model"] = _read_model(folder, config_json, raw["model"])
    raw["data"]["tiling"] = _read_tiling(folder, raw["data"]["tiling"] if file.is_file() else None)
    try:
        return config_from_dict(raw), progress, history
    except UserError as error:
        raise UserError(f"{folder}: what its config.json and {PROCESSOR_FILE} say does not hold: {error}") from error


def _read_model(folder: Path, config_json: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The model as `config.json` has it; how it is computed (dtype, remat) is the run's affair."""
    language = dataclasses.replace(
        read_language_config(folder, "text_config"),
        tie_word_embeddings=bool(config_json.get("tie_word_embeddings", False)),
    )
    model = {"connector": config_json["connector_config"], "newline": bool(config_json.get("newline", False))}
    for name, part in (("vision", read_vision_config(folder, "vision_config")), ("language", language)):
        model[name] = dataclasses.asdict(part) | {field: run[name][field] for field in ("dtype", "remat")}
    # PyTorch's config always says how wide a head is; ours need not where it follows from the rest.
    if run["language"].get("head_dim") is None and language.head_width * language.num_heads == language.hidden_size:
        model["language"]["head_dim"] = None
    return model


def _read_tiling(folder: Path, default: dict[str, Any] | None) -> dict[str, Any]:
    """How pages are cut into tiles; `default` where the folder has lost its processor."""
    if default is not None and not (folder / PROCESSOR_FILE).is_file():
        return default
    fields = {field.name: field.default for field in dataclasses.fields(TilingConfig)}
    image_processor = _read_json(folder / PROCESSOR_FILE).get("image_processor") or {}
    # Folders exported before there was anyres_max_9 do not have its field.
    missing = [name for name in fields if name not in image_processor and name != "grid_side"]
    if missing:
        raise UserError(
            f"{folder / PROCESSOR_FILE}: its image_processor does not say {', '.join(missing)}; take the file of the "
            "folder that training started from, or save the processor with `processor.save_pretrained`"
        )
    return {name: image_processor.get(name, default) for name, default in fields.items()}


def _read_tokenizer(folder: Path, config_json: dict[str, Any], num_embeddings: int) -> ChatTokenizer:
    if (folder / TRAINING_FILE).is_file():
        tokenizer = ChatTokenizer.from_folder(folder)
    else:
        image_token = _read_json(folder / PROCESSOR_FILE).get("image_token")
        tokenizer = import_tokenizer(folder, num_embeddings=num_embeddings, image_token=image_token).chat
    if tokenizer.vocab_size > num_embeddings:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model {num_embeddings}")
    if tokenizer.image_id != config_json.get("image_token_id"):
        raise UserError(
            f"{folder}: the tokenizer's image token has id {tokenizer.image_id}, config.json's is "
            f"{config_json.get('image_token_id')}: they are not of one model"
        )
    return tokenizer


def _read_params(files: TensorFiles, config: AlignVLMConfig, dtype: str | None, mesh: Mesh | None) -> Params:
    rows = tables.alignvlm(config)
    abstract = abstract_parameters(config, mesh=mesh, dtype=dtype or "float32")
    if dtype is None:
        stored = {row.path: files.dtypes.get(row.key.format(layer=0)) for row in rows}
        leaves = flatten_dict(abstract, sep="/")
        abstract = unflatten_dict(
            {path: leaf.update(dtype=_kept(stored[path], leaf.dtype)) for path, leaf in leaves.items()}, sep="/"
        )
    unused = ("lm_head.",) if config.language.tie_word_embeddings else ()
    return convert.load_params(files, rows, abstract, source=files.folder, ignore=unused)


def _kept(stored: np.dtype | None, default: np.dtype) -> np.dtype:
    """The dtype that a weight keeps; whatever else may lie in the file is for `convert.py` to refuse or to convert."""
    return stored if stored is not None and stored.name in DTYPES else default


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not an AlignVLM folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a table of names and values")
    return content
