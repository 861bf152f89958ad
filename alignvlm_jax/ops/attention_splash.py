"""Splash attention for TPUs, with the Pallas kernel that JAX includes.

Axes: B rows, L positions, H query heads, G key-value heads, h head width.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) requires lengths that are multiples of its blocks, so
rows are padded with positions that belong to no segment: the 729 patches of an image tile become 768. It skips blocks
above the diagonal. Blocks between two segments are computed and masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

_LANES = 128
_NO_SEGMENT = -1
_ONE_BLOCK = 1024  # a row of up to this length is one block
_BLOCK = 512  # block size of longer rows


def unsupported(query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """Returns the property of these shapes or this dtype that the kernel does not support, or None.

    After padding, every length and head width is supported.
    """
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
    """Computes `attention.packed_attention` for the rows and heads of one device.

    Args:
      query: queries.
      key: keys.
      value: values.
      segment_ids: segment of each position.
      causal: whether a position attends only to itself and earlier positions.
      interpret: whether to run the kernel in Pallas's interpreter, which is slow but works on a CPU.
    """
    length, num_heads, width = query.shape[1:]
    padded, block = _padded_length(length)

    def prepare(heads):
        # The kernel's layout is [H, L, h]; `vmap` adds the rows.
        return jnp.pad(heads, ((0, 0), (0, padded - length), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    # Padding positions are a segment of their own, which no real position attends to.
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=_NO_SEGMENT)
    kernel = _make_kernel(num_heads, padded, block, causal, interpret)
    # The kernel does not scale the scores.
    attended = jax.vmap(kernel)(
        prepare(query * width**-0.5), prepare(key), prepare(value), splash.SegmentIds(segment_ids, segment_ids)
    )
    return attended.transpose(0, 2, 1, 3)[:, :length]


def _padded_length(length: int) -> tuple[int, int]:
    """Returns a row's padded length and the size of the kernel's blocks: 729 -> (768, 768), 9000 -> (9216, 512)."""
    if length <= _ONE_BLOCK:
        padded = -(-length // _LANES) * _LANES
        return padded, padded
    return -(-length // _BLOCK) * _BLOCK, _BLOCK


def _make_kernel(num_heads: int, length: int, block: int, causal: bool, interpret: bool):
    """Builds the kernel for queries and keys of the given padded length."""
    shape = (length, length)
    mask = splash.MultiHeadMask([splash.CausalMask(shape) if causal else splash.FullMask(shape)] * num_heads)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    # The result and the statistics of the softmax, the residuals of the backward kernels, both get the name.
    return make(mask, block_sizes=splash.BlockSizes(**sizes), residual_checkpoint_name=ATTENTION_OUT)
