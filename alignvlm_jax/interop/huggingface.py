"""SigLIP and Llama folders in Hugging Face layout: `config.json` and `model.safetensors`, read and written.

    config, params = load_vision_folder("siglip/")        # VisionConfig, parameters of models.vision.VisionEncoder
    config, params = load_language_folder("llama/")       # LanguageConfig, parameters of models.language.LanguageModel

Parameters come out as nested dicts of float32 numpy arrays. Every tensor is matched exactly once: what is missing, left
over or of another shape is reported together, in one error.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import tables
from alignvlm_jax.models.language import LanguageConfig, LanguageModel, RopeScaling
from alignvlm_jax.models.vision import VisionConfig, VisionEncoder

Params = dict[str, Any]

# Tensors of a full SigLIP checkpoint that AlignVLM has no use for.
_SIGLIP_UNUSED = ("vision_model.head.", "vision_model.embeddings.position_ids", "text_model.", "logit_")
_LLAMA_UNUSED = ("model.rotary_emb.",)


def load_vision_folder(folder: str | Path) -> tuple[VisionConfig, Params]:
    """Reads a SigLIP folder (a whole SigLIP, or its vision model alone).

    Raises:
      UserError: the folder, its config or its tensors are not what SigLIP's should be; all problems in one message.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    raw = raw.get("vision_config", raw)
    if raw.get("model_type") not in ("siglip_vision_model", "siglip", "siglip2_vision_model"):
        raise UserError(f"{folder}/config.json: model_type is {raw.get('model_type')!r}, not a SigLIP vision model")
    if raw.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f"{folder}/config.json: hidden_act is {raw['hidden_act']!r}, expected 'gelu_pytorch_tanh'")
    config = VisionConfig(
        image_size=raw.get("image_size", 224),
        patch_size=raw.get("patch_size", 16),
        hidden_size=raw.get("hidden_size", 768),
        intermediate_size=raw.get("intermediate_size", 3072),
        num_layers=raw.get("num_hidden_layers", 12),
        num_heads=raw.get("num_attention_heads", 12),
        layer_norm_eps=raw.get("layer_norm_eps", 1e-6),
    )
    tensors = _read_tensors(folder)
    if not any(key.startswith("vision_model.") for key in tensors):
        tensors = {f"vision_model.{key}": tensor for key, tensor in tensors.items()}  # newer transformers' key layout
    tensors = _without(tensors, _SIGLIP_UNUSED)
    side = config.image_size
    shapes = _shapes(VisionEncoder(config), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    return config, to_params(tensors, tables.SIGLIP, shapes, config.num_layers, folder)


def load_language_folder(folder: str | Path) -> tuple[LanguageConfig, Params]:
    """Reads a Llama folder.

    Raises:
      UserError: the folder, its config or its tensors are not what Llama's should be; all problems in one message.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    if raw.get("model_type") != "llama":
        raise UserError(f"{folder}/config.json: model_type is {raw.get('model_type')!r}, expected 'llama'")
    # transformers 5 moved the rotary settings from two top-level keys into `rope_parameters`.
    rope = raw.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{folder}/config.json: rope type {rope_type!r} is not supported, only 'default' and 'llama3'")
    scaling_fields = {field.name: rope.get(field.name) for field in dataclasses.fields(RopeScaling)}
    config = LanguageConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim"),
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling=RopeScaling(**scaling_fields) if rope_type == "llama3" else None,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
    )
    unused = _LLAMA_UNUSED + (("lm_head.",) if config.tie_word_embeddings else ())
    tensors = _without(_read_tensors(folder), unused)
    inputs = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = _shapes(LanguageModel(config), inputs, positions=ids, segment_ids=ids)
    table = tables.llama(config.tie_word_embeddings)
    return config, to_params(tensors, table, shapes, config.num_layers, folder)


def save_vision_folder(folder: str | Path, config: VisionConfig, params: Params, dtype: str = "bfloat16") -> None:
    """Writes the encoder as a folder that transformers' `SiglipVisionModel.from_pretrained` loads."""
    tensors = to_tensors(params, tables.SIGLIP, config.num_layers)
    _write_folder(folder, siglip_config(config, dtype), tensors, dtype)


def save_language_folder(
    folder: str | Path,
    config: LanguageConfig,
    params: Params,
    dtype: str = "bfloat16",
    *,
    special_tokens: Mapping[str, int] | None = None,
) -> None:
    """Writes the decoder as a folder that transformers' `LlamaForCausalLM.from_pretrained` loads.

    Args:
      folder: created if it does not exist.
      config: shape of the decoder.
      params: parameters of `LanguageModel`.
      dtype: "bfloat16" or "float32".
      special_tokens: `bos_token_id` and the like, written into `config.json`.
    """
    tensors = to_tensors(params, tables.llama(config.tie_word_embeddings), config.num_layers)
    _write_folder(folder, {**llama_config(config, dtype), **(special_tokens or {})}, tensors, dtype)


def siglip_config(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """The encoder's `config.json`: a `SiglipVisionConfig`."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "dtype": dtype,
    }


def llama_config(config: LanguageConfig, dtype: str) -> dict[str, Any]:
    """The decoder's `config.json`: a `LlamaConfig`."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": dtype,
    }


def to_params(
    tensors: dict[str, np.ndarray],
    table: tuple[tables.Row, ...],
    shapes: dict[str, tuple[int, ...]],
    num_layers: int,
    source: str | Path,
) -> Params:
    """Turns tensors into a parameter tree by a conversion table.

    Args:
      tensors: what the checkpoint holds.
      table: which tensor is which parameter.
      shapes: the shape each parameter must have, by path.
      num_layers: how many tensors `{layer}` stands for.
      source: named in the error.

    Raises:
      UserError: listing every tensor that is missing, left over, or of another shape than the config promises.
    """
    problems, params, used = [], {}, set()
    for row in table:
        keys = [row.key.format(layer=layer) for layer in range(num_layers)] if "{layer}" in row.key else [row.key]
        used.update(keys)
        missing = [key for key in keys if key not in tensors]
        if missing:
            problems += [f"{key} is missing" for key in missing]
            continue
        stacked = "{layer}" in row.key
        expected = shapes[row.path][1:] if stacked else shapes[row.path]
        arrays = [np.asarray(row.transform.to_jax(tensors[key]), np.float32) for key in keys]
        wrong = [(key, array.shape) for key, array in zip(keys, arrays, strict=True) if array.shape != expected]
        if wrong:
            problems += [f"{key} becomes {shape}, the config says {expected}" for key, shape in wrong]
            continue
        params[tuple(row.path.split("/"))] = np.stack(arrays) if stacked else arrays[0]
    problems += [f"{key} is not part of this model" for key in sorted(set(tensors) - used)]
    if problems:
        raise UserError(f"{source}: the tensors do not fit the config: " + "; ".join(problems))
    return unflatten_dict(params)


def to_tensors(params: Params, table: tuple[tables.Row, ...], num_layers: int) -> dict[str, np.ndarray]:
    """Turns a parameter tree into tensors: `to_params` backwards."""
    flat = {"/".join(path): np.asarray(array) for path, array in flatten_dict(params).items()}
    tensors = {}
    for row in table:
        array = flat[row.path]
        slices = [(row.key.format(layer=layer), array[layer]) for layer in range(num_layers)]
        for key, part in slices if "{layer}" in row.key else [(row.key, array)]:
            tensors[key] = row.transform.to_torch(part)
    return tensors


def _shapes(module, *inputs, **keywords) -> dict[str, tuple[int, ...]]:
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *_zeros(inputs), **_zeros(keywords)))["params"]
    return {"/".join(path): array.shape for path, array in flatten_dict(nn.unbox(boxed)).items()}


def _zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a Hugging Face folder: it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _without(tensors: dict[str, np.ndarray], prefixes: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "model.safetensors"
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{folder} has no model.safetensors") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _write_folder(folder: str | Path, config: dict, tensors: dict[str, np.ndarray], dtype: str) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    tensors = {key: np.ascontiguousarray(tensor.astype(numpy_dtype)) for key, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
