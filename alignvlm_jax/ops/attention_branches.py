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
its vector memory. The backward pass computes them again. Blocks of empty slots are skipped.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

_MASKED = -1e30  # finite: an empty slot attends to no key, and -inf would give NaN
_BLOCK_BYTES = 16 << 20  # memory of the scores of a block
_TILE = 8  # the number of slots in a block is a multiple of this, which fills a TPU's registers


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
    # As many slots per block as fit, in full tiles.
    size = min(_BLOCK_BYTES // (4 * batch * repeats * length), num_slots) // _TILE * _TILE or _TILE
    num_blocks = -(-num_slots // size)

    def split(array, fill=0):
        """Returns [n, B, s, ...]."""
        padding = ((0, 0), (0, num_blocks * size - num_slots), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, padding, constant_values=fill)
        return array.reshape(batch, num_blocks, size, *array.shape[2:]).swapaxes(0, 1)

    # [n, B, s, H, h] -> [G, n, B, R, s, h] -> [G, n, B, R s, h]: the queries that share a key are rows of one product.
    blocks = split(query * width**-0.5).reshape(num_blocks, batch, size, groups, repeats, width)
    blocks = blocks.transpose(3, 0, 1, 4, 2, 5).reshape(groups, num_blocks, batch, repeats * size, width)
    ids = [jnp.tile(split(array, -1), (1, 1, repeats))[..., None] for array in slot_ids]
    key_ids = [array[:, None] for array in key_ids]
    # Checkpoint, so that the inputs are kept once, and not for each block.
    attend_block = jax.checkpoint(_attend_block, prevent_cse=False)

    def attend_head(head):
        # The gradients of the keys are sums over blocks, in the dtype that the keys have here.
        keys, values = (array.astype(jnp.float32) for array in head[:2])
        return jax.lax.map(lambda block: attend_block(block[0], keys, values, block[1], key_ids), (head[2], ids))

    out = jax.lax.map(attend_head, (jnp.moveaxis(key, 2, 0), jnp.moveaxis(value, 2, 0), blocks))
    # [G, n, B, R, s, h] -> [B, n, s, G, R, h]
    out = out.reshape(groups, num_blocks, batch, repeats, size, width).transpose(2, 1, 4, 0, 3, 5)
    return out.reshape(batch, num_blocks * size, num_heads, width)[:, :num_slots]


@jax.custom_vjp
def _attend_block(
    queries: Float[Array, "B m h"],
    keys: Float[Array, "B L h"],
    values: Float[Array, "B L h"],
    slot_ids: Sequence[Int[Array, "B m 1"]],
    key_ids: Sequence[Int[Array, "B 1 L"]],
) -> Float[Array, "B m h"]:
    """Attends from a block of slots; see `_attend_slots`.

    Most rows have fewer branch tokens than the budget. Blocks whose slots are all empty are skipped, forward and
    backward. (Automatic differentiation of `cond` would store the scores, also for blocks that are skipped.)
    """

    def skip(queries, keys, values):
        return jnp.zeros_like(queries)

    return jax.lax.cond(_is_needed(slot_ids), _block_function(slot_ids, key_ids), skip, queries, keys, values)


def _attend_block_forward(*inputs):
    return _attend_block(*inputs), inputs


def _attend_block_backward(inputs, cotangent):
    *arrays, slot_ids, key_ids = inputs

    def differentiate(*arrays):
        return jax.vjp(_block_function(slot_ids, key_ids), *arrays)[1](cotangent)

    def skip(*arrays):
        return tuple(jnp.zeros_like(array) for array in arrays)

    return *jax.lax.cond(_is_needed(slot_ids), differentiate, skip, *arrays), None, None


_attend_block.defvjp(_attend_block_forward, _attend_block_backward)


def _is_needed(slot_ids: Sequence[Int[Array, "B m 1"]]) -> Bool[Array, ""]:
    return jnp.any(slot_ids[0] > 0)


def _block_function(slot_ids: Sequence[Int[Array, "B m 1"]], key_ids: Sequence[Int[Array, "B 1 L"]]) -> Callable:
    """Returns the function from queries, keys and values of a block to its results."""

    def attend(queries, keys, values):
        segments, branches, positions = slot_ids
        key_segments, key_branches = key_ids
        dtype = queries.dtype
        allowed = (segments == key_segments) & can_see(branches, key_branches)
        allowed &= positions >= jnp.arange(keys.shape[1])
        scores = jnp.einsum("bmh,bkh->bmk", queries, keys.astype(dtype), preferred_element_type=jnp.float32)
        scores = jnp.where(allowed, scores, _MASKED)
        # The maximum cancels in the result, so it needs no gradient.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights, values = weights.astype(dtype), values.astype(dtype)
        mixed = jnp.einsum("bmk,bkh->bmh", weights, values, preferred_element_type=jnp.float32)
        return (mixed / total).astype(dtype)

    return attend
