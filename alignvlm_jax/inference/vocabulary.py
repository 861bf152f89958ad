"""ALIGN's vocabulary with frozen weights: cached statistics, and pruning of rarely used words.

Axes: V vocabulary, k kept words, B rows, M tiles per row, S tile side, D decoder width.

    variables = cache_vocabulary(config, params)                    {"params": ..., "vocabulary": {"connector": ...}}
    usage = vocabulary_usage(config, variables, tiles, valid_hw)    to be summed over many pages
    config, params = prune_vocabulary(config, params, usage, 3400)  a smaller model, for inference and export

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
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Params
from alignvlm_jax.models.connectors import AlignConfig
from alignvlm_jax.ops import VocabularyStatistics, vocabulary_statistics

Variables = dict[str, Any]
"""Variables of `AlignVLM(config).apply`: collections of arrays, including "params"."""

WORD_PARAMETERS = ("w2", "vocab_norm_scale", "vocab_norm_bias")
"""Parameters of ALIGN that have a row per word."""


@ordinary_modes()
def cache_vocabulary(config: AlignVLMConfig, params: Params) -> Variables:
    """Returns the model's variables: the parameters and, for an ALIGN that is not pruned, the statistics of W2."""
    params = nn.meta.unbox(params)
    if not isinstance(config.connector, AlignConfig) or config.connector.kept_words is not None:
        return {"params": params}
    statistics = _statistics(params["connector"]["w2"], hardware.resolve(config.language).dtype)
    return {"params": params, "vocabulary": {"connector": {"statistics": statistics}}}


@ordinary_modes()
def prune_vocabulary(
    config: AlignVLMConfig,
    params: Params,
    usage: Float[Array, " V"],
    k: int,
    *,
    statistics: Literal["full", "kept"] = "full",
) -> tuple[AlignVLMConfig, Params]:
    """Prunes ALIGN to the rows of W2 and of the values for its k most used words.

    The decoder keeps its whole vocabulary. The pruned model (`AlignConfig.kept_words`) works like any other, but it
    cannot be trained.

    Args:
      config: configuration of the model.
      params: parameters of the model, not pruned yet.
      usage: usage of each word, from `vocabulary_usage` or any other count.
      k: number of words to keep.
      statistics: rows over which LN_V takes its mean and variance. "full" means all rows of W2: the logits of the kept
        words are then exactly as in the full model, and P is the full model's P divided by its mass on them. "kept"
        means the k rows, which shifts and scales the logits.

    Returns:
      The configuration and the parameters of the pruned model.

    Raises:
      UserError: if the connector is not ALIGN or is already pruned, or if `usage` or `k` does not fit the vocabulary.
    """
    connector = config.connector
    if not isinstance(connector, AlignConfig):
        raise UserError("prune_vocabulary: only ALIGN has a vocabulary to prune; set the model's connector to align")
    if connector.kept_words is not None:
        raise UserError(
            f"prune_vocabulary: this model is already pruned to {connector.kept_words} words; prune the full model"
        )
    params = nn.meta.unbox(params)  # Removes Flax's boxes of logical axis names.
    w2 = params["connector"]["w2"]
    if usage.shape != w2.shape[:1]:
        raise UserError(
            f"prune_vocabulary: usage has {len(usage)} words, but ALIGN has {w2.shape[0]}; measure it on this model"
        )
    if not 0 < k <= w2.shape[0]:
        raise UserError(f"prune_vocabulary: k must be from 1 to {w2.shape[0]}, the number of words of ALIGN, got {k}")
    # Kept words are in the order of the vocabulary. Of equally used words, the first ones are kept.
    words = np.sort(np.argsort(-np.asarray(usage), kind="stable")[:k])
    pruned = {name: leaf[words] if name in WORD_PARAMETERS else leaf for name, leaf in params["connector"].items()}
    # LN_V's statistics are stored, because the removed rows are no longer there to compute them from.
    rows = w2 if statistics == "full" else pruned["w2"]
    row_statistics = _statistics(rows, hardware.resolve(config.language).dtype)
    pruned |= {
        "word_ids": jnp.asarray(words, jnp.int32),
        "key_mean": row_statistics.mean,
        "key_covariance": row_statistics.covariance,
    }
    config = dataclasses.replace(config, connector=dataclasses.replace(connector, kept_words=k))
    return config, {**params, "connector": pruned}


@ordinary_modes()
def vocabulary_usage(
    config: AlignVLMConfig,
    variables: Variables,
    tiles: UInt8[Array, "B M S S 3"],
    tile_valid_hw: Int[Array, "B M 2"],
) -> Float[Array, " V"]:
    """Returns ALIGN's usage of each word: P summed over the visual tokens of all tiles. Sum it over many pages.

    Args:
      config: configuration of the model.
      variables: variables of the model. If it is pruned, V is its number of kept words.
      tiles: pixels of the tiles.
      tile_valid_hw: height and width of the image's part of each tile. Tiles without such a part are not counted.
    """
    return _usage(AlignVLM(config), variables, tiles, tile_valid_hw)


@functools.partial(jax.jit, static_argnames="model")
def _usage(model: AlignVLM, variables: Variables, tiles, tile_valid_hw):
    def usage(model: AlignVLM):
        features = model.encode_features(tiles, tile_valid_hw)
        # One flag per tile, broadcast to its tokens: padding tiles do not count.
        is_valid = (tile_valid_hw[..., 0] > 0).reshape(-1, 1)
        return model.connector.usage(features, model.language.embedding, jnp.broadcast_to(is_valid, features.shape[:2]))

    return model.apply(variables, method=usage)


@functools.partial(jax.jit, static_argnames="dtype")
def _statistics(keys: Float[Array, "V D"], dtype: str) -> VocabularyStatistics:
    return vocabulary_statistics(keys, dtype=dtype)
