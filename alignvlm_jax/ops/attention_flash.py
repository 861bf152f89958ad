"""Flash attention for NVIDIA GPUs from Ampere on, with the Pallas (Triton) kernel that JAX includes.

Axes: B rows, L positions, H query heads, G key-value heads, h head width.

The kernel (`jax.experimental.pallas.ops.gpu.attention`) supports segments and holds the scores of one block only:
besides its inputs and its result, it stores one float32 per query and head. It does not support grouped queries, so the
key-value heads are repeated. That takes L x H x h values each for keys and values (80 MB per row in bfloat16, for the
8B model and 9,728 positions).
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128
_NO_SEGMENT = -1
_WIDEST_HEAD = 256


@functools.cache
def _kernels() -> Any:
    """Imports the kernel, which takes a tenth of a second; returns None if this version of JAX has none."""
    # JAX 0.11 deprecates the kernel, and 0.12 still has it. A program that imports the library can do nothing about
    # that, and would end if it runs with `-W error`.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu import attention
    except ImportError:
        return None
    return attention


def unavailable() -> str | None:
    """Returns why the kernel cannot be used in this environment, or None."""
    return None if _kernels() else f"JAX {jax.__version__} has no jax.experimental.pallas.ops.gpu.attention"


def unsupported(query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """Returns the property of these shapes or this dtype that the kernel does not support, or None."""
    num_heads, width = query_shape[2:]
    if num_heads % key_shape[2]:
        return f"{num_heads} heads that share {key_shape[2]} key-value heads"
    return f"heads of width {width}, above {_WIDEST_HEAD}" if width > _WIDEST_HEAD else None


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
    padding = -length % _BLOCK

    def prepare(heads):
        # Repeat the key-value heads to H heads, and pad the length to full blocks.
        heads = jnp.repeat(heads, num_heads // heads.shape[2], axis=2)
        return jnp.pad(heads, ((0, 0), (0, padding), (0, 0), (0, 0)))

    # Small blocks for wide heads: two blocks must fit into a multiprocessor's shared memory, about 100 KB on consumer
    # cards.
    blocks = _kernels().BlockSizes(
        block_q=_BLOCK,
        block_k=_BLOCK if width <= 64 else _BLOCK // 2,
        block_q_dkv=32,
        block_kv_dkv=32,
        block_q_dq=32,
        block_kv_dq=32,
    )
    attended = _kernels().mha(
        prepare(query),
        prepare(key),
        prepare(value),
        jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=_NO_SEGMENT),
        sm_scale=width**-0.5,
        causal=causal,
        block_sizes=blocks,
        interpret=interpret,
    )
    return attended[:, :length]
