"""Splash attention for TPUs, with the Pallas kernel that JAX includes.

Axes: B rows, L positions, H query heads, G key-value heads, h head width, n blocks per row.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) requires lengths that are multiples of its blocks, so
rows are padded with positions that belong to no segment: the 729 patches of an image tile become 768.

It skips the blocks that `attention_blocks.needed_blocks` leaves out, forward and backward: those above the diagonal,
those between segments, and padding. The kernel reads which blocks to run from tables. JAX makes them from a mask that
is known at compile time. Here they come from the segments of the batch.

One call computes all rows of a device. The rows are joined into one sequence, and the tables confine each row to its
own blocks. (Tables for each row of a batch, with `jax.vmap`, become a loop over rows that copies each of them.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.errors import UserError
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops.attention_blocks import needed_blocks, next_needed
from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

_LANES = 128
_NO_SEGMENT = -1
_ONE_BLOCK = 1024  # a row of up to this length is one block
_BLOCK = 512  # block size of longer rows


def _kernels() -> Any:
    """Imports JAX's kernel, which takes a tenth of a second, where it is used: not on a CPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


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
      segment_ids: segment of each position, 0 for padding. Values at padding are finite but have no meaning.
      causal: whether a position attends only to itself and earlier positions.
      interpret: whether to run the kernel in Pallas's interpreter, which is slow but works on a CPU.
    """
    rows, length, num_heads, width = query.shape
    padded, block = _padded_length(length)

    def prepare(heads):
        # The kernel's layout is [H, B * L, h], here with an axis of one in front.
        heads = jnp.pad(heads, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return heads.reshape(1, rows * padded, *heads.shape[2:]).transpose(0, 2, 1, 3)

    # Padding positions are a segment of their own, which no real position attends to.
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=_NO_SEGMENT)
    needed = needed_blocks(segment_ids, block, causal=causal)
    kernel = _skip_blocks(_make_kernel(num_heads, padded, block, causal, interpret), needed, block)
    joined_ids = segment_ids.reshape(1, -1)
    # The kernel does not scale the scores. With a batch axis of one, XLA reads one lane of the 128 equal ones of the
    # softmax statistics; without it, XLA transposes all of them.
    attended = jax.vmap(kernel)(
        prepare(query * width**-0.5), prepare(key), prepare(value), _kernels().SegmentIds(joined_ids, joined_ids)
    )
    # A block of queries that runs with no keys is 0 / 0. These are blocks of padding.
    attended = attended.reshape(num_heads, -1, block, width)
    attended = jnp.where(jnp.any(needed, axis=2).reshape(-1, 1, 1), attended, 0)
    return attended.reshape(num_heads, rows, padded, width).transpose(1, 2, 0, 3)[:, :length]


@ordinary_modes()
def executed_blocks(segment_ids: Int[Array, "B L"], *, causal: bool) -> dict[str, int]:
    """Returns the number of blocks that each kernel ("fwd", "dq", "dkv") runs for these segments, per head.

    A block has `block_size(L)` queries and as many keys. Without skipping there are `num_blocks(L) ** 2` per row.

    Args:
      segment_ids: segment of each position, 0 for padding. The values must be concrete.
      causal: whether a position attends only to itself and earlier positions.
    """
    padded, block = _padded_length(segment_ids.shape[1])
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - segment_ids.shape[1])), constant_values=_NO_SEGMENT)
    tables = _block_tables(needed_blocks(segment_ids, block, causal=causal))
    return {kernel: int(jnp.sum(run > 0)) for kernel, (run, _) in tables.items()}


def block_size(length: int) -> int:
    """Returns the number of positions in a block of rows of this length."""
    return _padded_length(length)[1]


def num_blocks(length: int) -> int:
    """Returns n, the number of blocks in a row of this length."""
    padded, block = _padded_length(length)
    return padded // block


def _padded_length(length: int) -> tuple[int, int]:
    """Returns a row's padded length and the size of the kernel's blocks: 729 -> (768, 768), 9000 -> (9216, 512)."""
    if length <= _ONE_BLOCK:
        padded = -(-length // _LANES) * _LANES
        return padded, padded
    return -(-length // _BLOCK) * _BLOCK, _BLOCK


def _make_kernel(num_heads: int, length: int, block: int, causal: bool, interpret: bool):
    """Builds the kernel for one row of the given padded length, which runs all blocks between segments."""
    shape = (length, length)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    splash = _kernels()
    mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * num_heads)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    # The result and the statistics of the softmax, the residuals of the backward kernels, both get the name.
    return make(mask, block_sizes=splash.BlockSizes(**sizes), residual_checkpoint_name=ATTENTION_OUT)


def _skip_blocks(kernel: Any, needed: Bool[Array, "B n n"], block: int):
    """Returns the kernel of one row changed to run the needed blocks of B joined rows."""
    rows, num_blocks, _ = needed.shape
    tables = _block_tables(needed)

    def replace(info: Any, name: str) -> Any:
        # Masks in memory are indexed by block, and smaller tables have other indices. JAX makes neither for our masks.
        in_memory = (info.mask_next, info.partial_mask_blocks)
        if info.block_mask.shape != (1, num_blocks, num_blocks) or any(array is not None for array in in_memory):
            raise UserError(
                f"splash attention of JAX {jax.__version__} has other block tables than expected; install a version "
                'in the range of setup.py, or set config.model.language.attention and vision.attention to "xla"'
            )
        block_mask, data_next = tables[name]
        # The causal mask compares positions in the joined sequence.
        positions = None if info.q_sequence is None else jnp.arange(rows * num_blocks * block, dtype=jnp.int32)
        return info._replace(block_mask=block_mask, data_next=data_next, q_sequence=positions)

    infos = {name: replace(getattr(kernel, f"{name}_mask_info"), name) for name in tables}
    return _kernels().SplashAttentionKernel(*infos.values(), **kernel.kwargs)


def _block_tables(needed: Bool[Array, "B n n"]) -> dict[str, tuple[Array, Array]]:
    """Returns for each kernel which steps of its grid run, and the block that each step loads.

    The grids of "fwd" and "dq" are [B * n, n]: for each block of queries in the joined sequence, the key blocks of its
    row. The grid of "dkv" is [n, B * n]: for each block of keys (second axis), the query blocks of its row. A step
    loads a block with an index in the joined sequence. A step that is skipped loads the block of a later step.
    """
    rows, n, _ = needed.shape
    first = n * jnp.arange(rows)[:, None, None]  # the first block of each row
    # One order of steps over all rows: at the end of a block of queries, the keys of the next one are loaded.
    step = next_needed(needed.reshape(-1))
    key_block = (n * (step // n**2) + step % n).reshape(rows * n, n)
    # The steps of a block of keys repeat for each head, and only then comes the next block: [B, j, i].
    query_block = first + next_needed(needed.transpose(0, 2, 1))

    dtype = jnp.int8 if rows * n <= 128 else jnp.int16 if rows * n <= 2**15 else jnp.int32
    by_query = needed.reshape(1, rows * n, n).astype(jnp.int8), key_block[None].astype(dtype)

    def by_key(table):  # [B, j, i] -> [1, i, B * j]
        return table.transpose(2, 0, 1).reshape(1, n, rows * n)

    by_key_tables = by_key(needed.transpose(0, 2, 1)).astype(jnp.int8), by_key(query_block).astype(dtype)
    return {"fwd": by_query, "dq": by_query, "dkv": by_key_tables}
