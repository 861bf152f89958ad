"""ALIGN's vocabulary when its weights are frozen: what is computed once, and words that are hardly used left out.

Axes: V vocabulary, k words kept, B rows, M tiles per row, S tile side, D decoder width.

Both make the collection "vocabulary" that `AlignConnector` looks for beside its parameters:

    variables = cache_vocabulary(config, params)                    {"params": ..., "vocabulary": ...}
    usage = vocabulary_usage(config, variables, tiles, valid_hw)    summed over many pages
    variables = prune_vocabulary(config, params, usage, 3400)
    AlignVLM(config).apply(variables, batch, cache, method="prefill")

The paper (arXiv 2502.01341) prunes at evaluation, without retraining: 3.4K of Llama's 128K words carry the mass of P on
documents.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from alignvlm_jax.errors import UserError
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Params
from alignvlm_jax.models.connectors import AlignConfig
from alignvlm_jax.ops import VocabularyStatistics, vocabulary_statistics

Variables = dict[str, Any]
"""What `AlignVLM(config).apply` takes: collections of arrays, "params" among them."""

OF_A_WORD = ("w2", "vocab_norm_scale", "vocab_norm_bias")
"""ALIGN's parameters that have a row for each word."""


def cache_vocabulary(config: AlignVLMConfig, params: Params) -> Variables:
    """The parameters with the statistics of W2 beside them; alone, where the connector is another one."""
    params = nn.meta.unbox(params)
    if not isinstance(config.connector, AlignConfig):
        return {"params": params}
    dtype = hardware.resolve(config.language).dtype
    return _variables(params, {"statistics": _statistics(params["connector"]["w2"], dtype)})


def prune_vocabulary(
    config: AlignVLMConfig,
    params: Params,
    usage: Float[Array, " V"],
    k: int,
    *,
    statistics: Literal["full", "kept"] = "full",
) -> Variables:
    """Keeps the rows of W2 and of the values that belong to the k most used words; the decoder keeps all of its own.

    Args:
      config: of the model.
      params: its parameters, not pruned yet.
      usage: how much each word is used (`vocabulary_usage`, or counts of one's own).
      k: how many words to keep.
      statistics: of which rows LN_V takes mean and variance. "full", the default: of all rows of W2, cached. The logits
        of the words kept are then exactly the full model's, and P is the full model's P divided by the mass that it has
        on them. "kept": of the k rows, which needs nothing of the full W2 but shifts and scales the logits.

    Returns:
      Variables of the pruned model, for the same `config`.
    """
    if not isinstance(config.connector, AlignConfig):
        raise UserError("prune_vocabulary: only ALIGN has a vocabulary to prune; set the model's connector to align")
    params = nn.meta.unbox(params)
    w2 = params["connector"]["w2"]
    if usage.shape != w2.shape[:1]:
        raise UserError(
            f"prune_vocabulary: usage is of {len(usage)} words, but ALIGN has {w2.shape[0]}: measure it on this model"
        )
    if not 0 < k <= w2.shape[0]:
        raise UserError(f"prune_vocabulary: k is {k}, but ALIGN has {w2.shape[0]} words: take 1 to {w2.shape[0]}")
    # In the order of the vocabulary; of equally used words the first.
    words = np.sort(np.argsort(-np.asarray(usage), kind="stable")[:k])
    connector = {name: leaf[words] if name in OF_A_WORD else leaf for name, leaf in params["connector"].items()}
    rows = w2 if statistics == "full" else connector["w2"]
    vocabulary = {"words": jnp.asarray(words), "statistics": _statistics(rows, hardware.resolve(config.language).dtype)}
    return _variables({**params, "connector": connector}, vocabulary)


def vocabulary_usage(
    config: AlignVLMConfig,
    variables: Variables,
    tiles: UInt8[Array, "B M S S 3"],
    tile_valid_hw: Int[Array, "B M 2"],
) -> Float[Array, " V"]:
    """How much ALIGN uses each word: P summed over the visual tokens of real tiles. Add it up over pages.

    Args:
      config: of the model.
      variables: of the model, not pruned.
      tiles: pixels.
      tile_valid_hw: the part of each tile that is picture; a tile without any is not counted.
    """
    return _usage(AlignVLM(config), variables, tiles, tile_valid_hw)


@functools.partial(jax.jit, static_argnames="model")
def _usage(model: AlignVLM, variables: Variables, tiles, tile_valid_hw):
    def of_features(model: AlignVLM):
        features = model.encode_features(tiles, tile_valid_hw)
        real = (tile_valid_hw[..., 0] > 0).reshape(-1, 1)
        return model.connector.usage(features, model.language.embedding, jnp.broadcast_to(real, features.shape[:2]))

    return model.apply(variables, method=of_features)


@functools.partial(jax.jit, static_argnames="dtype")
def _statistics(keys: Float[Array, "V D"], dtype: str) -> VocabularyStatistics:
    return vocabulary_statistics(keys, dtype=dtype)


def _variables(params: Params, vocabulary: dict[str, Any]) -> Variables:
    return {"params": params, "vocabulary": {"connector": vocabulary}}
