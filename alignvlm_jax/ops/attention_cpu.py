"""Attention for packed rows on a CPU: a loop over pairs of blocks, with a backward pass of its own.

Axes: B rows, L positions, H query heads, G key-value heads, R = H / G, h head width, n blocks, s positions in a block,
m = R s, the queries of a block that share a key.

A pair is a block of queries and a block of keys. Scores of one pair are held at a time, so they stay in the cache of
the CPU. Pairs in which no query may attend to a key are skipped: those after the diagonal if `causal`, and those whose
segments differ in all rows. The range of pairs of a block depends on the segments, so the loops are while loops.

A block of branches needs the page and the branches in the block itself, and skips the siblings between the two. With
branches, the pairs of a block are therefore a list instead of a range.

The forward pass is that of flash attention: a softmax over the keys so far, rescaled when its maximum rises. Its
residuals are the inputs, the result and the logarithm of each query's normalizer. From these, the backward pass
computes the weights of a pair again, without their maximum and their sum.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops.attention_branches import can_see
from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

_BLOCK = 128  # largest number of positions in a block
_MASKED = -1e30  # finite: if every key of a query is masked, -inf would give NaN
# Segments as the loops see them: they are in ascending order in a packed row, and padding is at the end.
_PADDING, _ADDED = 2**30, 2**30 + 1


@ordinary_modes()
def attend(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    segment_ids: Int[Array, "B L"],
    branch_ids: Int[Array, "B L"] | None = None,
    *,
    causal: bool,
) -> Float[Array, "B L H h"]:
    """Attends within the segments of each row; see `attention.packed_attention`."""
    batch, length, num_heads, width = query.shape
    groups = key.shape[2]
    num_blocks = -(-length // _BLOCK)
    size = -(-length // num_blocks)

    def split(array, fill=0):
        """Returns [n, B, s, ...]: contiguous blocks of positions."""
        padding = ((0, 0), (0, num_blocks * size - length), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, padding, constant_values=fill)
        return jnp.moveaxis(array.reshape(batch, num_blocks, size, *array.shape[2:]), 1, 0)

    segments = split(jnp.where(segment_ids > 0, segment_ids, _PADDING), _ADDED)
    branches = None if branch_ids is None else split(branch_ids)
    # [n, B, s, H, h] -> [n, B, G, R, s, h] -> [n, B, G, m, h]: the query heads of a group are rows of one product.
    grouped = split(query * width**-0.5).reshape(num_blocks, batch, size, groups, -1, width)
    queries = grouped.transpose(0, 1, 3, 4, 2, 5).reshape(num_blocks, batch, groups, -1, width)
    keys, values = (split(array).swapaxes(2, 3) for array in (key, value))
    out = _attend(causal, queries, keys, values, _Ids(segments, branches))
    # [n, B, G, R, s, h] -> [B, n, s, G, R, h]
    out = out.reshape(num_blocks, batch, groups, -1, size, width).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, -1, num_heads, width)[:, :length]


class _Ids(NamedTuple):
    """Segments of all positions, and their branches if there are trees."""

    segments: Int[Array, "n B s"]
    branches: Int[Array, "n B s"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    causal: bool,
    queries: Float[Array, "n B G m h"],
    keys: Float[Array, "n B G s h"],
    values: Float[Array, "n B G s h"],
    ids: _Ids,
) -> Float[Array, "n B G m h"]:
    return _attend_forward(causal, queries, keys, values, ids)[0]


# With `jit`, JAX traces the loops once per shape, and not in every layer and every program. They are inlined, so the
# programs do not change.
@functools.partial(jax.jit, static_argnums=0, inline=True)
@ordinary_modes()
def _attend_forward(causal, queries, keys, values, ids):
    first, last, block_at = _steps(_needed_pairs(ids, causal), ids)

    def attend_block(i, results):
        query = queries[i]

        def add_pair(step, carry):
            maximum, total, mixed = carry
            j = block_at(i, step)
            scores = _dot("mh,kh->mk", query, keys[j])
            scores = jnp.where(_mask(ids, i, j, query.shape[2], causal), scores, _MASKED)
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_maximum)
            decay = jnp.exp(maximum - new_maximum)
            total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
            return new_maximum, total, mixed * decay + _dot("mk,kh->mh", weights.astype(values.dtype), values[j])

        column = jnp.zeros((*query.shape[:-1], 1))
        start = column + _MASKED, column, jnp.zeros(query.shape)
        maximum, total, mixed = jax.lax.fori_loop(first[i], last[i], add_pair, start)
        block = (mixed / total).astype(values.dtype), maximum + jnp.log(total)
        return jax.tree.map(lambda whole, part: whole.at[i].set(part), results, block)

    empty = jnp.zeros(queries.shape, values.dtype), jnp.zeros((*queries.shape[:-1], 1))
    results = jax.lax.fori_loop(0, len(queries), attend_block, empty)
    # With this name, a rematerialization policy can keep both, so that the backward pass does not attend again.
    out, normalizers = checkpoint_name(results, ATTENTION_OUT)
    return out, (queries, keys, values, ids, out, normalizers)


@functools.partial(jax.jit, static_argnums=0, inline=True)
@ordinary_modes()
def _attend_backward(causal, residuals, cotangent):
    queries, keys, values, ids, out, normalizers = residuals
    dtype = values.dtype
    # Sum over the keys of weight * dL/dweight, which the softmax subtracts from each dL/dweight.
    expected = jnp.sum(cotangent.astype(jnp.float32) * out, axis=-1, keepdims=True)
    # For each block of keys, the blocks of queries that attend to it.
    first, last, block_at = _steps(_needed_pairs(ids, causal).T, ids)

    def add_block(j, gradients):
        dqueries, dkeys, dvalues = gradients
        key, value = keys[j], values[j]

        def add_pair(step, carry):
            dqueries, dkey, dvalue = carry
            i = block_at(j, step)
            query, dout = queries[i], cotangent[i]
            weights = jnp.exp(_dot("mh,kh->mk", query, key) - normalizers[i])
            weights = jnp.where(_mask(ids, i, j, query.shape[2], causal), weights, 0.0)
            dscores = (weights * (_dot("mh,kh->mk", dout, value) - expected[i])).astype(dtype)
            dqueries = dqueries.at[i].add(_dot("mk,kh->mh", dscores, key))
            dkey += _dot("mk,mh->kh", dscores, query)
            return dqueries, dkey, dvalue + _dot("mk,mh->kh", weights.astype(dtype), dout)

        zeros = jnp.zeros(key.shape)
        dqueries, dkey, dvalue = jax.lax.fori_loop(first[j], last[j], add_pair, (dqueries, zeros, zeros))
        return dqueries, dkeys.at[j].set(dkey), dvalues.at[j].set(dvalue)

    inputs = queries, keys, values
    empty = tuple(jnp.zeros(array.shape) for array in inputs)
    gradients = jax.lax.fori_loop(0, len(keys), add_block, empty)
    return *(gradient.astype(array.dtype) for gradient, array in zip(gradients, inputs, strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _dot(axes: str, left: Array, right: Array) -> Array:
    """Returns an einsum over the last two axes, batched over rows and groups, in float32."""
    left_axes, right_axes, out_axes = axes.replace("->", ",").split(",")
    equation = f"bg{left_axes},bg{right_axes}->bg{out_axes}"
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _needed_pairs(ids: _Ids, causal: bool) -> Bool[Array, "n n"]:
    """Returns which blocks of keys (axis 1) a block of queries (axis 0) needs: those that share a segment in a row.

    With branches, they must also share a branch, or the keys belong to a page.
    """
    is_needed = _overlap(ids.segments)
    if ids.branches is not None:
        # Number the pages and branches of a row in the order of their positions.
        segments, branches = (jnp.concatenate(tuple(array), axis=1) for array in ids)
        changes = (jnp.diff(segments, axis=1) != 0) | (jnp.diff(branches, axis=1) != 0)
        runs = jnp.cumsum(jnp.pad(changes, ((0, 0), (1, 0))), axis=1)
        runs = jnp.moveaxis(runs.reshape(len(runs), len(ids.segments), -1), 1, 0)
        is_needed &= _overlap(runs) | _overlap(ids.segments, ids.branches == 0)
    is_needed = jnp.any(is_needed, axis=2)
    return jnp.tril(is_needed) if causal else is_needed


def _overlap(ids: Int[Array, "n B s"], is_key: Bool[Array, "n B s"] | None = None) -> Bool[Array, "n n B"]:
    """Returns whether the ids of a block of queries (axis 0) and of a block of keys (axis 1) overlap in a row.

    Those of a block lie between the smallest and the largest.

    Args:
      ids: ids of the positions.
      is_key: the positions that count as keys; None for all.
    """
    low, high = jnp.min(ids, axis=2), jnp.max(ids, axis=2)
    key_low, key_high = low, high
    if is_key is not None:
        key_low = jnp.min(ids, axis=2, where=is_key, initial=_ADDED + 1)
        key_high = jnp.max(ids, axis=2, where=is_key, initial=-1)
    return (high[:, None] >= key_low[None]) & (low[:, None] <= key_high[None])


def _steps(is_needed: Bool[Array, "n n"], ids: _Ids) -> tuple[Int[Array, " n"], Int[Array, " n"], Callable]:
    """Returns the steps of each block's loop: the first, the one after the last, and a function to the other block.

    Without branches, the step is the other block, from the first to the last that is needed. Every block needs one,
    on the diagonal. With branches, it is the number of a needed block.
    """
    if ids.branches is not None:
        order = jnp.argsort(~is_needed, axis=1, stable=True).astype(jnp.int32)
        last = jnp.sum(is_needed, axis=1).astype(jnp.int32)
        return jnp.zeros_like(last), last, lambda block, step: order[block, step]
    first = jnp.argmax(is_needed, axis=1)
    last = is_needed.shape[1] - jnp.argmax(is_needed[:, ::-1], axis=1)
    return first.astype(jnp.int32), last.astype(jnp.int32), lambda block, step: step


def _mask(ids: _Ids, i: Array, j: Array, num_queries: int, causal: bool) -> Bool[Array, "B 1 m s"]:
    """Returns which queries of block i attend to which keys of block j."""
    segments, branches = ids
    size = segments.shape[2]
    allowed = segments[i][:, :, None] == segments[j][:, None, :]
    if branches is not None:
        allowed &= can_see(branches[i][:, :, None], branches[j][:, None, :])
    if causal:
        positions = jnp.arange(size)
        allowed &= positions[:, None] - positions >= (j - i) * size
    # The same for each of the R heads of a group.
    return jnp.tile(allowed, (1, num_queries // size, 1))[:, None]
