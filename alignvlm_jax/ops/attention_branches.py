"""Attention of the branches of trees, next to a kernel that knows only segments.

Axes: B rows, L positions, H query heads, G key-value heads, R = H / G, h head width, t slots for branch tokens, n
blocks of slots, s slots in a block.

A tree is a segment with a page and its branches, one after the other. A branch attends to the page and to itself
(`branch_ids` of `attention.packed_attention`). The kernels "splash", "tokamax" and "flash" compare only segments, so
the work is divided:

    pages      The kernel runs with the tokens of branches as padding, so it skips most of their blocks.
    branches   The tokens of branches are few: questions and answers without their images. They are gathered to t slots
               per row, attend to the keys of their row, and are scattered back.

Page and branch are keys of one softmax, and the keys of siblings are masked. The statistics of the kernel's softmax
have no gradient, so two results could not be merged in training.

The slots attend in blocks, one key-value head at a time. A block's scores are a few MiB, so a TPU can keep them in
its vector memory. The backward pass computes them again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

_MASKED = -1e30  # finite: an empty slot attends to no key, and -inf would give NaN
_BLOCK_BYTES = 8 << 20  # memory of the scores of a block
_ROWS = 8  # the number of slots in a block is a multiple of this, which keeps a TPU's tiles full


def can_see(query_branches: Int[Array, "*q"], key_branches: Int[Array, "*k"]) -> Bool[Array, "..."]:
    """Returns whether queries see keys of the same segment: those of the page and those of their own branch.

    Args:
      query_branches: branch of each query, in a shape that broadcasts against that of the keys.
      key_branches: branch of each key.
    """
    return (key_branches == 0) | (key_branches == query_branches)


def attend(
    attend_pages: Callable,
    num_slots: int,
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    segment_ids: Int[Array, "B L"],
    branch_ids: Int[Array, "B L"],
    *,
    causal: bool,
) -> Float[Array, "B L H h"]:
    """Computes `attention.packed_attention` with branches for the rows and heads of one device.

    Args:
      attend_pages: the kernel, called as `attend_pages(query, key, value, segment_ids, causal=causal)`.
      num_slots: t, the largest number of branch tokens in a row. The branches of a row with more of them become NaN.
      query: queries.
      key: keys.
      value: values.
      segment_ids: segment of each position, 0 for padding.
      branch_ids: branch of each position, 0 for pages and padding.
      causal: must be True.
    """
    length = query.shape[1]
    num_slots = min(num_slots, length)
    is_branch = branch_ids > 0
    # To the kernel, the branches of segment i are padding of id -1 - i: each run of positions has its own id, as the
    # kernel of tokamax prefers, and none has -1, which marks the padding that kernels add.
    attended = attend_pages(query, key, value, jnp.where(is_branch, -1 - segment_ids, segment_ids), causal=causal)

    # The positions of the slots, in ascending order. Those of empty slots are beyond the row: gathering from them gives
    # zeros, and scattering to them does nothing.
    positions = jnp.arange(length)
    slots = jnp.sort(jnp.where(is_branch, positions, length + positions), axis=1)[:, :num_slots]
    rows = jnp.arange(len(slots))[:, None]
    hints = dict(indices_are_sorted=True, unique_indices=True)

    def gather(array, fill=0):
        return array.at[rows, slots].get(mode="fill", fill_value=fill, **hints)

    ids = gather(segment_ids, fill=-1), gather(branch_ids), slots
    branches = _attend_slots(gather(query), key, value, ids, (segment_ids, branch_ids))
    fits = jnp.sum(is_branch, axis=1) <= num_slots
    branches = jnp.where(fits[:, None, None, None], branches, jnp.nan)
    # A rematerialization policy keeps the results of the kernel and of the slots. The scatter may run again.
    branches = checkpoint_name(branches, ATTENTION_OUT)
    return attended.at[rows, slots].set(branches.astype(attended.dtype), mode="drop", **hints)


def _attend_slots(
    query: Float[Array, "B t H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    slot_ids: tuple[Int[Array, "B t"], ...],
    key_ids: tuple[Int[Array, "B L"], ...],
) -> Float[Array, "B t H h"]:
    """Attends from slots to all keys of their row.

    Args:
      query: queries of the slots.
      key: keys of all positions.
      value: values of all positions.
      slot_ids: segment, branch and position of each slot.
      key_ids: segment and branch of each key.
    """
    batch, num_slots, num_heads, width = query.shape
    length, groups = key.shape[1:3]
    repeats = num_heads // groups
    # As many slots per block as fit, in blocks of equal size.
    size = max(_BLOCK_BYTES // (4 * repeats * length), _ROWS)
    num_blocks = -(-num_slots // size)
    size = -(-num_slots // (num_blocks * _ROWS)) * _ROWS

    def split(array, fill=0):
        """Returns [B, n, s, ...]."""
        padding = ((0, 0), (0, num_blocks * size - num_slots), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, padding, constant_values=fill)
        return array.reshape(batch, num_blocks, size, *array.shape[2:])

    # [B, n, s, H, h] -> [B, G, n, R, s, h]
    blocks = split(query * width**-0.5).reshape(batch, num_blocks, size, groups, repeats, width)
    blocks = blocks.transpose(0, 3, 1, 4, 2, 5)
    slot_segments, slot_branches, slot_positions = (split(ids, -1) for ids in slot_ids)

    # Checkpoint, so that the backward pass recomputes the scores instead of storing them.
    @jax.checkpoint
    def attend_block(keys, values, ids, block):
        queries, segments, branches, positions = block
        key_segments, key_branches = ids
        allowed = (segments[:, None] == key_segments) & can_see(branches[:, None], key_branches)
        allowed &= positions[:, None] >= jnp.arange(length)
        # The queries of all heads that share the keys are rows of one product.
        scores = jnp.dot(queries.reshape(-1, width), keys.astype(query.dtype).T, preferred_element_type=jnp.float32)
        scores = jnp.where(allowed, scores.reshape(repeats, size, length), _MASKED).reshape(-1, length)
        # The maximum cancels in the result, so it needs no gradient.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.dot(weights.astype(value.dtype), values.astype(value.dtype), preferred_element_type=jnp.float32)
        return (mixed / total).astype(value.dtype).reshape(repeats, size, width)

    def attend_head(keys, values, queries, ids, slot_ids):
        # The blocks' gradients of the keys are summed in the dtype of these arrays.
        keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
        return jax.lax.map(lambda block: attend_block(keys, values, ids, block), (queries, *slot_ids))

    def attend_row(row):
        keys, values, queries, ids, slot_ids = row
        heads = keys.swapaxes(0, 1), values.swapaxes(0, 1), queries
        return jax.lax.map(lambda head: attend_head(*head, ids, slot_ids), heads)

    out = jax.lax.map(attend_row, (key, value, blocks, key_ids, (slot_segments, slot_branches, slot_positions)))
    # [B, G, n, R, s, h] -> [B, n, s, G, R, h]
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(batch, num_blocks * size, num_heads, width)
    return out[:, :num_slots]
