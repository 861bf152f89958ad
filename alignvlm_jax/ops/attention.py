"""Attention over packed rows, and over a key-value cache.

Axes: B rows, L query positions, K key positions, H query heads, G key-value heads, R = H / G, h head width.

Queries are taken in blocks, and a block's scores are computed again in the backward pass: no [L, K] array outlives its
block, and a causal block never looks at the keys behind it. On a CPU this is 2-3 times the speed of the plain form
(scores stay in the cache); elsewhere it saves the memory.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite, so that a row of padding (every key masked) stays free of NaN
_QUERY_BLOCK = 64


def packed_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    causal: bool,
) -> Float[Array, "B L H h"]:
    """Attends within each segment of a row, and only backwards if `causal`.

    Example, one row holding two examples and a pad, causal; `x` marks what a query sees:

        segment_ids   1 1 2 2 0
        query 0       x . . . .
        query 1       x x . . .
        query 2       . . x . .
        query 3       . . x x .
        query 4       . . . . x

    Args:
      query: H may be a multiple of G (grouped-query attention): head i reads key-value head i // (H // G).
      key: keys.
      value: values.
      segment_ids: 0 is padding; no attention crosses a segment. None means that every row is one segment.
      causal: whether a position sees only itself and what precedes it.

    Returns:
      The attended values, in the dtype of `query`; softmax statistics are float32.
    """
    length = query.shape[1]

    def mask(queries: slice, keys: slice) -> Bool[Array, "B l k"] | None:
        allowed = None
        if segment_ids is not None:
            allowed = segment_ids[:, queries, None] == segment_ids[:, None, keys]
        if causal:
            backwards = jnp.arange(length)[queries, None] >= jnp.arange(length)[None, keys]
            allowed = backwards[None] if allowed is None else allowed & backwards
        return allowed

    return _attend_in_blocks(query, key, value, mask, causal)


def cached_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B K G h"],
    value: Float[Array, "B K G h"],
    *,
    visible: Bool[Array, "#B L K"],
) -> Float[Array, "B L H h"]:
    """Attends from new positions to the slots of a cache that `visible` names."""
    return _attend_in_blocks(query, key, value, lambda queries, keys: visible[:, queries, keys], causal=False)


def _attend_in_blocks(query, key, value, mask: Callable[[slice, slice], Array | None], causal: bool):
    """Softmax attention, a block of queries at a time; `mask` says what queries and keys of two slices may see."""
    batch, length, num_heads, width = query.shape
    groups, repeats = key.shape[2], num_heads // key.shape[2]
    query = query.reshape(batch, length, groups, repeats, width).transpose(0, 2, 3, 1, 4) * width**-0.5
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)

    @jax.checkpoint
    def attend(block, keys, values, allowed):
        # The repeats of a group share its keys: they are rows of one matrix product.
        size = block.shape[3]
        rows = block.reshape(batch, groups, repeats * size, width)
        scores = jnp.einsum("bgmh,bghk->bgmk", rows, keys, preferred_element_type=jnp.float32)
        if allowed is not None:
            scores = scores.reshape(batch, groups, repeats, size, -1)
            scores = jnp.where(allowed[:, None, None], scores, _MASKED)
            scores = scores.reshape(batch, groups, repeats * size, -1)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bgmk,bgkh->bgmh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / total).astype(values.dtype).reshape(batch, groups, repeats, size, width)

    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        queries = slice(start, min(start + _QUERY_BLOCK, length))
        keys = slice(0, queries.stop if causal else key.shape[3])
        block = attend(query[:, :, :, queries], key[..., keys], value[:, :, keys], mask(queries, keys))
        blocks.append(block)
    out = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, width)
