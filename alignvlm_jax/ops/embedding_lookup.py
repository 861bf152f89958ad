"""Looks up rows of an embedding table that is split over a mesh.

Axes: B rows of ids (b on a device), n ids on a device, V vocabulary, D width, K rows of the table in a block.

With plain indexing, XLA gathers the complete table in float32 (2 GB for the 8B model), and also its gradient. Here,
each device looks up the ids whose rows it holds, and a sum over the devices combines the results. If the width is also
split, blocks of rows are gathered one at a time, as in `vocabulary_streaming.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops import vocabulary_streaming as streaming
from alignvlm_jax.ops.gradient_dtype import exchanged_dtype

_BLOCK_SIZE = 16384
"""Default of K. Every block is compared with all ids, so a few large blocks are best."""


@ordinary_modes()
def embedding_lookup(
    table: Float[Array, "V D"],
    ids: Int[Array, "B ..."],
    *,
    dtype: str,
    block_size: int = _BLOCK_SIZE,
    mesh_axes: streaming.VocabularyMesh = streaming.UNSHARDED,
) -> Float[Array, "B ... D"]:
    """Returns `table[ids]` in `dtype`; the gradient of the table is summed over ids in float32.

    Args:
      table: embedding table, with one row per word.
      ids: row indices in [0, V).
      dtype: dtype of the result.
      block_size: K, used if the width of the table is split.
      mesh_axes: axes of the current mesh that split the first axis of `ids`, and the rows and the width of the table.
    """
    axes = streaming.resolve(mesh_axes, num_queries=ids.shape[0], num_rows=table.shape[0], widths=table.shape[1:])
    is_split = axes.vocabulary or axes.widths
    # XLA sums the gradient of an indexed table over devices in the table's dtype.
    if not is_split and (not axes.queries or exchanged_dtype() == table.dtype):
        return jnp.take(table, ids, axis=0).astype(dtype)
    # Unless the width is split, nothing is gathered, and one block with all rows is enough.
    return _lookup(_Options(axes, dtype, block_size if axes.widths else table.shape[0]), table, ids)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static (hashable) options of the custom-VJP functions."""

    axes: streaming.VocabularyMesh
    dtype: str
    block_size: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(options: _Options, table: Float[Array, "V D"], ids: Int[Array, "B ..."]) -> Float[Array, "B ... D"]:
    axes = options.axes

    def local(part, ids):
        table, flat = streaming.Table(part, axes), _local_ids(ids, part.shape[0], axes)

        def step(start, size, output):
            is_inside = (flat >= start) & (flat < start + size)
            block = table.read_block(start, size, options.dtype)
            # Ids outside the block read an arbitrary row of it, which `where` discards.
            rows = jnp.take(block, jnp.clip(flat - start, 0, size - 1), axis=0)
            return jnp.where(is_inside[:, None], rows, output)

        output = jnp.zeros((flat.size, table.width), options.dtype)
        output = streaming.stream(step, output, num_rows=table.num_rows, block_size=options.block_size)
        # For each id, one device holds the row and all others hold zeros, so the sum is exact in any dtype.
        return streaming.all_reduce(output, axes.vocabulary).reshape(*ids.shape, -1)

    ids_spec = streaming.query_spec(axes)
    return streaming.shard(local, axes, (streaming.table_spec(axes), ids_spec), ids_spec)(table, ids)


@ordinary_modes()
def _lookup_forward(options, table, ids):
    return _lookup(options, table, ids), (table, ids)


@ordinary_modes()
def _lookup_backward(options, residuals, cotangent):
    axes = options.axes
    ids_spec, table_spec = streaming.query_spec(axes), streaming.table_spec(axes)

    def local(part, ids, cotangent):
        table, flat = streaming.Table(part, axes), _local_ids(ids, part.shape[0], axes)
        cotangent = cotangent.reshape(flat.size, -1).astype(jnp.float32)

        def step(start, size, dtable):
            # Ids outside the block get an index past its end, which mode="drop" ignores.
            index = jnp.where((flat >= start) & (flat < start + size), flat - start, size)
            block = jnp.zeros((size, table.width)).at[index].add(cotangent, mode="drop")
            return table.update_gradient(dtable, start, block)

        # Sum in float32 regardless of the table's dtype, because an id may occur many times.
        dtable = jnp.zeros(part.shape)
        dtable = streaming.stream(step, dtable, num_rows=table.num_rows, block_size=options.block_size)
        return streaming.all_reduce_gradient(dtable, axes.queries_only).astype(part.dtype)

    return streaming.shard(local, axes, (table_spec, ids_spec, ids_spec), table_spec)(*residuals, cotangent), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _local_ids(ids: Int[Array, "b ..."], num_rows: int, axes: streaming.VocabularyMesh) -> Int[Array, " n"]:
    """Returns the ids, flattened and relative to this device's first row. Ids of other devices are out of range."""
    first = jax.lax.axis_index(axes.vocabulary) * num_rows if axes.vocabulary else 0
    return ids.reshape(-1) - first
