"""ALIGN's vocabulary when its weights are frozen: what is computed once, and words that are hardly used left out.

Axes: V vocabulary, k words kept, B rows, M tiles per row, S tile side, D decoder width.

    variables = cache_vocabulary(config, params)                    {"params": ..., "vocabulary": {"connector": ...}}
    usage = vocabulary_usage(config, variables, tiles, valid_hw)    summed over many pages
    config, params = prune_vocabulary(config, params, usage, 3400)  a smaller model, to be asked, saved and exported

The paper (arXiv 2502.01341) prunes at evaluation, without retraining: 3.4K of Llama's 128K words carry the mass of P on
documents.
"""

import dataclasses
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
    """The parameters with the statistics of W2 beside them; alone, where the connector is another one or pruned."""
    params = nn.meta.unbox(params)
    if not isinstance(config.connector, AlignConfig) or config.connector.kept_words is not None:
        return {"params": params}
    statistics = _statistics(params["connector"]["w2"], hardware.resolve(config.language).dtype)
    return {"params": params, "vocabulary": {"connector": {"statistics": statistics}}}


def prune_vocabulary(
    config: AlignVLMConfig,
    params: Params,
    usage: Float[Array, " V"],
    k: int,
    *,
    statistics: Literal["full", "kept"] = "full",
) -> tuple[AlignVLMConfig, Params]:
    """Keeps the rows of W2 and of the values that belong to the k most used words; the decoder keeps all of its own.

    The model that comes out is a model like any other (`AlignConfig.kept_words`), but not one to be trained.

    Args:
      config: of the model.
      params: its parameters, not pruned yet.
      usage: how much each word is used (`vocabulary_usage`, or counts of one's own).
      k: how many words to keep.
      statistics: of which rows LN_V takes mean and variance. "full", the default: of all rows of W2. The logits of the
        words kept are then exactly the full model's, and P is the full model's P divided by the mass that it has on
        them. "kept": of the k rows, which shifts and scales the logits.

    Returns:
      The pruned model's config and parameters.
    """
    connector = config.connector
    if not isinstance(connector, AlignConfig):
        raise UserError("prune_vocabulary: only ALIGN has a vocabulary to prune; set the model's connector to align")
    if connector.kept_words is not None:
        raise UserError(
            f"prune_vocabulary: this model is pruned to {connector.kept_words} words already: prune the full one"
        )
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
    pruned = {name: leaf[words] if name in OF_A_WORD else leaf for name, leaf in params["connector"].items()}
    rows = w2 if statistics == "full" else pruned["w2"]
    of_rows = _statistics(rows, hardware.resolve(config.language).dtype)
    pruned |= {
        "word_ids": jnp.asarray(words, jnp.int32),
        "key_mean": of_rows.mean,
        "key_covariance": of_rows.covariance,
    }
    config = dataclasses.replace(config, connector=dataclasses.replace(connector, kept_words=k))
    return config, {**params, "connector": pruned}


def vocabulary_usage(
    config: AlignVLMConfig,
    variables: Variables,
    tiles: UInt8[Array, "B M S S 3"],
    tile_valid_hw: Int[Array, "B M 2"],
) -> Float[Array, " V"]:
    """How much ALIGN uses each word: P summed over the visual tokens of real tiles. Add it up over pages.

    Args:
      config: of the model.
      variables: of the model; if it is pruned, V is its k words.
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
