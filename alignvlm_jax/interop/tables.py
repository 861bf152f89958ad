"""Conversion tables of the backbones and of the whole model: the PyTorch tensor of each parameter, and its transform.

`SIGLIP` and `llama` are the tables of the backbones in transformers' layout, and `alignvlm` is the table of a complete
exported folder. The connectors' tables are in `models/connectors/`. Tables hold only names and axes: `convert.py` reads
tensors with them, and `export.py` writes them.
"""

import dataclasses
from collections.abc import Callable

from alignvlm_jax.models.alignvlm import AlignVLMConfig, connector_shape
from alignvlm_jax.models.connectors import connector_spec
from alignvlm_jax.models.weight_table import CONV, Row, layer_norm_rows, linear_rows

_SIGLIP_LAYER = "vision_model.encoder.layers.{layer}"
_LLAMA_LAYER = "model.layers.{layer}"

SIGLIP: tuple[Row, ...] = (
    Row("patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", CONV),
    Row("patch_embedding/bias", "vision_model.embeddings.patch_embedding.bias"),
    Row("position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *layer_norm_rows("layers/attention_norm", f"{_SIGLIP_LAYER}.layer_norm1"),
    *linear_rows("layers/attention/query", f"{_SIGLIP_LAYER}.self_attn.q_proj", bias=True),
    *linear_rows("layers/attention/key", f"{_SIGLIP_LAYER}.self_attn.k_proj", bias=True),
    *linear_rows("layers/attention/value", f"{_SIGLIP_LAYER}.self_attn.v_proj", bias=True),
    *linear_rows("layers/attention/out", f"{_SIGLIP_LAYER}.self_attn.out_proj", bias=True),
    *layer_norm_rows("layers/mlp_norm", f"{_SIGLIP_LAYER}.layer_norm2"),
    *linear_rows("layers/mlp_in", f"{_SIGLIP_LAYER}.mlp.fc1", bias=True),
    *linear_rows("layers/mlp_out", f"{_SIGLIP_LAYER}.mlp.fc2", bias=True),
    *layer_norm_rows("final_norm", "vision_model.post_layernorm"),
)

_LLAMA: tuple[Row, ...] = (
    Row("embedding", "model.embed_tokens.weight"),
    Row("layers/attention_norm/scale", f"{_LLAMA_LAYER}.input_layernorm.weight"),
    *linear_rows("layers/attention/query", f"{_LLAMA_LAYER}.self_attn.q_proj", bias=False),
    *linear_rows("layers/attention/key", f"{_LLAMA_LAYER}.self_attn.k_proj", bias=False),
    *linear_rows("layers/attention/value", f"{_LLAMA_LAYER}.self_attn.v_proj", bias=False),
    *linear_rows("layers/attention/out", f"{_LLAMA_LAYER}.self_attn.o_proj", bias=False),
    Row("layers/mlp_norm/scale", f"{_LLAMA_LAYER}.post_attention_layernorm.weight"),
    *linear_rows("layers/mlp/gate", f"{_LLAMA_LAYER}.mlp.gate_proj", bias=False),
    *linear_rows("layers/mlp/up", f"{_LLAMA_LAYER}.mlp.up_proj", bias=False),
    *linear_rows("layers/mlp/down", f"{_LLAMA_LAYER}.mlp.down_proj", bias=False),
    Row("final_norm/scale", "model.norm.weight"),
)


def llama(tie_word_embeddings: bool) -> tuple[Row, ...]:
    """Returns the decoder's table. With tied embeddings, there is no `lm_head.weight`."""
    return _LLAMA if tie_word_embeddings else (*_LLAMA, Row("lm_head", "lm_head.weight"))


def alignvlm(config: AlignVLMConfig) -> tuple[Row, ...]:
    """Returns the table of a complete exported folder."""

    def prefixed(path: str, rows: tuple[Row, ...], rename: Callable[[str], str]) -> list[Row]:
        return [dataclasses.replace(row, path=f"{path}/{row.path}", key=rename(row.key)) for row in rows]

    def language_key(key: str) -> str:
        # The LM head is outside the inner model, so only the decoder's keys move under `language_model`.
        return key if key.startswith("lm_head.") else key.replace("model.", "model.language_model.", 1)

    connector = connector_spec(config.connector).weight_rows(config.connector, connector_shape(config))
    # In PyTorch the newline is next to the connector, as in LLaVA-NeXT; in JAX it is one of the connector's weights.
    newline = [Row("connector/newline", "model.image_newline")] if config.newline else []
    return (
        *newline,
        *prefixed("vision", SIGLIP, "model.vision_tower.{}".format),
        *prefixed("connector", connector, "model.connector.{}".format),
        *prefixed("language", llama(config.language.tie_word_embeddings), language_key),
    )
