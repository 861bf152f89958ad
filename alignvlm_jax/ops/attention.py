"""Attention over packed rows, and over a key-value cache.

Axes: B rows, L query positions, K key positions, H query heads, G key-value heads, h head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite, so that a row of padding (every key masked) stays free of NaN


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
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    if causal:
        backwards = jnp.tril(jnp.ones((length, length), bool))[None]
        mask = backwards if mask is None else mask & backwards
    return _attend(query, key, value, mask)


def cached_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B K G h"],
    value: Float[Array, "B K G h"],
    *,
    visible: Bool[Array, "B L K"],
) -> Float[Array, "B L H h"]:
    """Attends from new positions to the slots of a cache that `visible` names."""
    return _attend(query, key, value, visible)


def _attend(query, key, value, mask: Bool[Array, "#B L K"] | None):
    batch, length, num_heads, head_dim = query.shape
    num_groups = key.shape[2]
    query = query.reshape(batch, length, num_groups, num_heads // num_groups, head_dim)
    scores = jnp.einsum("blgrh,bkgh->bgrlk", query, key, preferred_element_type=jnp.float32)
    scores *= head_dim**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrlk,bkgh->blgrh", weights, value).reshape(batch, length, num_heads, head_dim)
