"""Fetches a model from the Hub: the files that this project reads, and no others.

    model_folder(parse_model("google/siglip-so400m-patch14-384"))               config.json, model.safetensors, ...
    model_folder(parse_model("meta-llama/Llama-3.2-1B"), with_weights=False)    without the weights

Repositories often hold the weights several times: pickled, in GGUF, in ONNX, in Meta's format under original/. Only
safetensors in the layout of transformers are fetched, in the order in which `interop/weight_files.py` chooses.
"""

import json
from collections.abc import Collection
from pathlib import Path

from alignvlm_jax.downloads import hub
from alignvlm_jax.downloads.contents import ADAPTER_CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from alignvlm_jax.downloads.hub_ids import HubId
from alignvlm_jax.errors import UserError

# Configs, tokenizers and chat templates. They are in the top folder, except for templates with names of their own.
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "additional_chat_templates/*.jinja")
_NOT_READ = ("*.index.json", "onnx_*.json", "openvino_*.json")


def model_folder(hub_id: HubId, *, with_weights: bool = True, is_quiet: bool = False) -> Path:
    """Returns the folder in the cache that holds a model, after downloading what it lacks.

    Args:
      hub_id: the model.
      with_weights: whether the weights are needed, and not only configs and the tokenizer.
      is_quiet: whether to print nothing.

    Raises:
      UserError: if the model cannot be read, or it has no weights in safetensors.
    """
    files = hub.list_files(hub_id)
    folder = hub.fetch(files, small_files(files.sizes), is_quiet=is_quiet or with_weights)
    # An adapter is not a model. The reader of the folder says so.
    if not with_weights or (ADAPTER_CONFIG_FILE in files.sizes and "config.json" not in files.sizes):
        return folder
    names = weight_files(files.sizes, folder)
    if not names:
        raise UserError(_describe_without_weights(files))
    return hub.fetch(files, {*names, *small_files(files.sizes)}, is_quiet=is_quiet)


def small_files(names: Collection[str]) -> list[str]:
    """Returns the configs, tokenizers and chat templates among the files of a repository."""
    return [
        name
        for name in names
        if any(hub.matches(name, pattern) for pattern in _SMALL_FILES)
        and (name == INDEX_FILE or not any(hub.matches(name, pattern) for pattern in _NOT_READ))
    ]


def weight_files(names: Collection[str], folder: Path) -> list[str]:
    """Returns the files of the weights that are read; empty if there are none.

    Args:
      names: the files of the repository.
      folder: folder with the small files.
    """
    named = _read_json(folder / "config.json").get("transformers_weights")
    if isinstance(named, str) and named in names and named.endswith(".safetensors"):
        return [named]
    if WEIGHTS_FILE in names:
        return [WEIGHTS_FILE]
    weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
    if isinstance(weight_map, dict):
        # A shard that the repository lacks is reported by the reader, which knows more about the folder.
        return sorted(name for name in set(map(str, weight_map.values())) if name in names)
    return sorted(name for name in names if hub.matches(name, "model-*-of-*.safetensors"))


def _describe_without_weights(files: hub.RemoteFiles) -> str:
    """Returns why a repository has no weights to read, and what to do."""
    name = files.hub_id.name
    others = sorted(
        file for file in files.sizes if file.endswith((".bin", ".safetensors", ".gguf", ".onnx", ".pth", ".h5", ".pt"))
    )
    has = f"it has {', '.join(others[:3])}" if others else f"it has {', '.join(sorted(files.sizes)[:5])}"
    if files.reason:
        return f"{files.hub_id}: the cache has no weights of it, and {files.reason}. Download with a network first"
    if any(file.endswith(".bin") for file in others):
        return (
            f"{files.hub_id}: no {WEIGHTS_FILE} ({has}). The Hub's converter may have proposed one: if "
            f"huggingface.co/{name}/discussions lists it as number N, name {name}@refs/pr/N"
        )
    return f"{files.hub_id}: no {WEIGHTS_FILE}, nor shards of it ({has}): name a model in the format of transformers"


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
