"""Conversion tables: which Hugging Face tensor holds which parameter, and how its axes lie.

A `Row` pairs a parameter's path in our tree with a tensor's key; `{layer}` stands for a layer's number, whose tensors
are stacked on a leading axis here (the layers run under `nn.scan`). Reading, writing, shape checks and the report of
what is missing or left over are in `huggingface.py`; nothing but names and axes is said here.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a tensor's axes become a parameter's, and back. Sizes the tensor does not tell are taken from its shape."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _patches_to_conv(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out, channels, height, width = shape
    return kernel.reshape(height, width, channels, out).transpose(3, 2, 0, 1)


SAME = Transform(lambda tensor: tensor, lambda array, shape: array)
# torch.nn.Linear holds [out, in]; our Dense holds [in, out].
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda array, shape: array.T)
# torch.nn.Conv2d holds [out, channel, row, column]; ours multiplies patches flattened as (row, column, channel).
CONV = Transform(lambda tensor: tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0]), _patches_to_conv)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path ("layers/attention/query/kernel"), its tensor's key, and the transform between."""

    path: str
    key: str
    transform: Transform = SAME


def _linear(path: str, key: str, bias: bool) -> list[Row]:
    rows = [Row(f"{path}/kernel", f"{key}.weight", TRANSPOSED)]
    return rows + [Row(f"{path}/bias", f"{key}.bias")] if bias else rows


def _layer_norm(path: str, key: str) -> list[Row]:
    return [Row(f"{path}/scale", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")]


_SIGLIP_LAYER = "vision_model.encoder.layers.{layer}"
_LLAMA_LAYER = "model.layers.{layer}"

SIGLIP: tuple[Row, ...] = (
    Row("patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
    Row("patch_embedding/bias", "vision_model.embeddings.patch_embedding.bias"),
    Row("position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *_layer_norm("layers/attention_norm", f"{_SIGLIP_LAYER}.layer_norm1"),
    *_linear("layers/attention/query", f"{_SIGLIP_LAYER}.self_attn.q_proj", bias=True),
    *_linear("layers/attention/key", f"{_SIGLIP_LAYER}.self_attn.k_proj", bias=True),
    *_linear("layers/attention/value", f"{_SIGLIP_LAYER}.self_attn.v_proj", bias=True),
    *_linear("layers/attention/out", f"{_SIGLIP_LAYER}.self_attn.out_proj", bias=True),
    *_layer_norm("layers/mlp_norm", f"{_SIGLIP_LAYER}.layer_norm2"),
    *_linear("layers/mlp_in", f"{_SIGLIP_LAYER}.mlp.fc1", bias=True),
    *_linear("layers/mlp_out", f"{_SIGLIP_LAYER}.mlp.fc2", bias=True),
    *_layer_norm("final_norm", "vision_model.post_layernorm"),
)

_LLAMA: tuple[Row, ...] = (
    Row("embedding", "model.embed_tokens.weight"),
    Row("layers/attention_norm/scale", f"{_LLAMA_LAYER}.input_layernorm.weight"),
    *_linear("layers/attention/query", f"{_LLAMA_LAYER}.self_attn.q_proj", bias=False),
    *_linear("layers/attention/key", f"{_LLAMA_LAYER}.self_attn.k_proj", bias=False),
    *_linear("layers/attention/value", f"{_LLAMA_LAYER}.self_attn.v_proj", bias=False),
    *_linear("layers/attention/out", f"{_LLAMA_LAYER}.self_attn.o_proj", bias=False),
    Row("layers/mlp_norm/scale", f"{_LLAMA_LAYER}.post_attention_layernorm.weight"),
    *_linear("layers/mlp/gate", f"{_LLAMA_LAYER}.mlp.gate_proj", bias=False),
    *_linear("layers/mlp/up", f"{_LLAMA_LAYER}.mlp.up_proj", bias=False),
    *_linear("layers/mlp/down", f"{_LLAMA_LAYER}.mlp.down_proj", bias=False),
    Row("final_norm/scale", "model.norm.weight"),
)


def llama(tie_word_embeddings: bool) -> tuple[Row, ...]:
    """The decoder's table: with tied embeddings there is no `lm_head.weight`."""
    return _LLAMA if tie_word_embeddings else (*_LLAMA, Row("lm_head", "lm_head.weight"))
