"""Conversion tables: which PyTorch tensor holds which parameter, and how its axes lie.

A `Row` pairs a parameter's path in our tree with a tensor's key; `{layer}` stands for a layer's number, whose tensors
are stacked on a leading axis here (the layers run under `nn.scan`). Tables: `SIGLIP` and `llama` for the backbones as
transformers lays them out, `connector` for each connector, `alignvlm` for a whole exported folder. Nothing but names
and axes is said here; reading is in `convert.py`, writing in `export.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.connectors import (
    AlignConfig,
    CAbstractorConfig,
    ConnectorConfig,
    HReducerConfig,
    MLPConfig,
    OvisConfig,
    PerceiverConfig,
)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a tensor's axes become a parameter's, and back. Both ways give views where numpy can.

    Attributes:
      to_jax: the parameter that a tensor is.
      to_torch: the tensor that a parameter is.
      torch_shape: its shape.
    """

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[Shape], Shape]


def _conv(torch_shape: Callable[[Shape], Shape]) -> Transform:
    """torch.nn.Conv2d holds [out, channel, row, column]; ours multiplies windows laid flat: (row, column, channel)."""

    def to_torch(kernel: np.ndarray) -> np.ndarray:
        out, channels, height, width = torch_shape(kernel.shape)
        return kernel.reshape(height, width, channels, out).transpose(3, 2, 0, 1)

    def to_jax(tensor: np.ndarray) -> np.ndarray:
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])

    return Transform(to_jax, to_torch, torch_shape)


def _patch_shape(shape: Shape) -> Shape:
    side = math.isqrt(shape[0] // 3)
    return shape[1], 3, side, side


def _window_shape(shape: Shape) -> Shape:
    width = shape[1]
    return width, width, 1, shape[0] // width


SAME = Transform(lambda tensor: tensor, lambda array: array, lambda shape: shape)
# torch.nn.Linear holds [out, in]; our Dense holds [in, out].
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda array: array.T, lambda shape: shape[::-1])
CONV = _conv(_patch_shape)  # square patches of RGB
# A depthwise torch.nn.Conv2d holds [channel, 1, row, column]; ours is [row, column, channel].
DEPTHWISE = Transform(
    lambda tensor: tensor[:, 0].transpose(1, 2, 0),
    lambda array: array.transpose(2, 0, 1)[:, None],
    lambda shape: (shape[2], 1, *shape[:2]),
)
WINDOW_CONV = _conv(_window_shape)  # windows of one row, as many channels out as in


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


_GATED_MLP = ("gate", "up", "down")
_PRUNED = (
    Row("word_ids", "word_ids"),
    Row("key_mean", "key_statistics.mean"),
    Row("key_covariance", "key_statistics.covariance"),
)


def _perceiver(config: PerceiverConfig) -> tuple[Row, ...]:
    """Its layers are modules of their own, not stacked: a row for each."""
    rows = [Row("latents", "latents"), Row("final_norm/scale", "final_norm.weight")]
    for name in _GATED_MLP:
        rows += _linear(f"modality_projection/{name}", f"modality_projection.{name}", bias=False)
    for index in range(config.depth):
        path, key = f"layer_{index}", f"layers.{index}"
        for name in ("latents_norm", "context_norm", "mlp_norm"):
            rows.append(Row(f"{path}/{name}/scale", f"{key}.{name}.weight"))
        for name in ("query", "key", "value", "out"):
            rows += _linear(f"{path}/{name}", f"{key}.{name}", bias=False)
        for name in _GATED_MLP:
            rows += _linear(f"{path}/mlp/{name}", f"{key}.mlp.{name}", bias=False)
    return tuple(rows)


def _c_abstractor(config: CAbstractorConfig, source: int) -> tuple[Row, ...]:
    """Its blocks are modules of their own; the first has a convolution in its shortcut if it changes the width."""
    rows = [Row("position_embedding", "position_embedding")]
    for half in ("before", "after"):
        for index in range(config.depth):
            path, key = f"{half}_{index}", f"{half}.{index}"
            widens = half == "before" and index == 0 and source != config.hidden_size
            for name in ("conv_in", "conv_out", *(["shortcut"] if widens else [])):
                rows += _linear(f"{path}/{name}", f"{key}.{name}", bias=False)
                rows += _layer_norm(f"{path}/{name}_norm", f"{key}.{name}_norm")
            rows.append(Row(f"{path}/depthwise", f"{key}.depthwise.weight", DEPTHWISE))
            rows += _layer_norm(f"{path}/depthwise_norm", f"{key}.depthwise_norm")
            rows += _linear(f"{path}/squeeze", f"{key}.squeeze", bias=True)
            rows += _linear(f"{path}/excite", f"{key}.excite", bias=True)
    rows += _linear("readout_in", "readout_in", bias=True)
    return (*rows, *_linear("readout_out", "readout_out", bias=True))


def connector(config: ConnectorConfig, source: int) -> tuple[Row, ...]:
    """A connector's table, paths and keys relative to the connector; the type of `config` selects it.

    Args:
      config: of the connector.
      source: d, the encoder's width.
    """
    match config:
        case AlignConfig():
            return (
                *_linear("w1", "w1", bias=config.use_bias),
                *_layer_norm("hidden_norm", "hidden_norm"),
                Row("w2", "w2.weight"),
                Row("vocab_norm_scale", "vocab_norm.weight"),
                Row("vocab_norm_bias", "vocab_norm.bias"),
                *(_PRUNED if config.kept_words is not None else ()),
            )
        case MLPConfig():
            return (*_linear("linear_in", "linear_in", bias=True), *_linear("linear_out", "linear_out", bias=True))
        case OvisConfig():
            return (
                *_linear("head", "head", bias=False),
                *_layer_norm("word_norm", "word_norm"),
                Row("table", "table.weight"),
            )
        case HReducerConfig():
            return (
                Row("reduce/kernel", "reduce.weight", WINDOW_CONV),
                Row("reduce/bias", "reduce.bias"),
                *_linear("project", "project", bias=True),
            )
        case PerceiverConfig():
            return _perceiver(config)
        case CAbstractorConfig():
            return _c_abstractor(config, source)


def alignvlm(config: AlignVLMConfig) -> tuple[Row, ...]:
    """The table of a whole exported folder."""

    def under(path: str, rows: tuple[Row, ...], rename: Callable[[str], str]) -> list[Row]:
        return [dataclasses.replace(row, path=f"{path}/{row.path}", key=rename(row.key)) for row in rows]

    def language_key(key: str) -> str:
        return key if key.startswith("lm_head.") else key.replace("model.", "model.language_model.", 1)

    newline = [Row("connector/newline", "model.image_newline")] if config.newline else []
    return (
        *newline,
        *under("vision", SIGLIP, "model.vision_tower.{}".format),
        *under("connector", connector(config.connector, config.vision.hidden_size), "model.connector.{}".format),
        *under("language", llama(config.language.tie_word_embeddings), language_key),
    )
