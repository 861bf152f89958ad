"""Splash attention: Pallas attention for TPUs, from `jax.experimental.pallas.ops.tpu.splash_attention`.

Axes: B rows, L positions, H query heads, G key-value heads, h head width.

The kernel wants lengths in multiples of its blocks, so rows are padded with positions that belong to no segment: an
image tile's 729 patches become 768. It skips blocks above the diagonal; blocks between two segments it computes and
masks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

_LANES = 128
_NO_SEGMENT = -1
_ONE_BLOCK = 1024  # a row up to this length is one block
_BLOCK = 512


def refuses(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> str | None:
    """What of these shapes the kernel cannot take, or None. It takes every length and head width, after padding."""
    num_heads, num_kv_heads = query_shape[2], key_shape[2]
    return f"{num_heads} heads that share {num_kv_heads} key-value heads" if num_heads % num_kv_heads else None


def attend(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    segment_ids: Int[Array, "B L"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B L H h"]:
    """As `attention.packed_attention`, on one device's rows and heads; `interpret` runs it on a CPU, slowly."""
    length, num_heads, width = query.shape[1:]
    padded, block = _padded_length(length)

    def prepare(heads):
        return jnp.pad(heads, ((0, 0), (0, padded - length), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=_NO_SEGMENT)
    kernel = _make_kernel(num_heads, padded, block, causal, interpret)
    attended = jax.vmap(kernel)(
        prepare(query * width**-0.5), prepare(key), prepare(value), splash.SegmentIds(segment_ids, segment_ids)
    )
    return attended.transpose(0, 2, 1, 3)[:, :length]


def _padded_length(length: int) -> tuple[int, int]:
    """To what a row is padded, and the side of the kernel's blocks: 729 -> 768 and 768, 9000 -> 9216 and 512."""
    if length <= _ONE_BLOCK:
        padded = -(-length // _LANES) * _LANES
        return padded, padded
    return -(-length // _BLOCK) * _BLOCK, _BLOCK


def _make_kernel(num_heads: int, length: int, block: int, causal: bool, interpret: bool):
    side = (length, length)
    mask = splash.MultiHeadMask([splash.CausalMask(side) if causal else splash.FullMask(side)] * num_heads)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block
    )
    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    return make(mask, block_sizes=splash.BlockSizes(**sizes))
