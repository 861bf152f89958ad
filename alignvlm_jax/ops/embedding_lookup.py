"""Rows of an embedding table that is spread over a mesh.

Axes: B rows of ids, V vocabulary, D width, K rows of the table in a block; t and f, over how many devices the rows of
the table and its width are cut.

Left to XLA, the table is gathered whole, in float32 (2 GB for the 8B model), and so is its gradient. Here each device
looks up what it has of the rows (the sum over devices puts them together), and where the width is cut too, a block of
rows at a time is gathered, as in `vocabulary_streaming.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignvlm_jax.ops import vocabulary_streaming as streaming

_BLOCK_SIZE = 16384
"""K: every block looks at all ids again, so there should be few."""


def embedding_lookup(
    table: Float[Array, "V D"],
    ids: Int[Array, "B ..."],
    *,
    dtype: str,
    block_size: int = _BLOCK_SIZE,
    mesh_axes: streaming.VocabularyMesh = streaming.UNSHARDED,
) -> Float[Array, "B ... D"]:
    """`table[ids]` in `dtype`; the gradient of the table is summed in float32.

    Args:
      table: the rows.
      ids: in [0, V).
      dtype: of the result.
      block_size: K, where the width of the table is cut.
      mesh_axes: which axes of the mesh in force cut the first axis of `ids`, the rows and the width of the table.
    """
    axes = streaming.resolve(mesh_axes, num_queries=ids.shape[0], num_rows=table.shape[0], widths=table.shape[1:])
    if axes == streaming.VocabularyMesh(axes.queries):  # the table is whole
        return jnp.take(table, ids, axis=0).astype(dtype)
    return _lookup((axes, dtype, block_size if axes.widths else table.shape[0]), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(options, table, ids):
    axes, dtype, block_size = options

    def local(part, ids):
        table, flat = streaming.Table(part, axes), _own_ids(ids, part.shape[0], axes)

        def step(start, size, found):
            inside = (flat >= start) & (flat < start + size)
            rows = jnp.take(table.take(start, size, dtype), jnp.clip(flat - start, 0, size - 1), axis=0)
            return jnp.where(inside[:, None], rows, found)

        found = jnp.zeros((flat.size, table.width), dtype)
        found = streaming.stream(step, found, num_rows=table.num_rows, block_size=block_size)
        # At most one device found something: nothing is rounded.
        return streaming.add_up(found, axes.vocabulary).reshape(*ids.shape, -1)

    of_ids = streaming.query_spec(axes)
    return streaming.shard(local, axes, (streaming.table_spec(axes), of_ids), of_ids)(table, ids)


def _lookup_forward(options, table, ids):
    return _lookup(options, table, ids), (table, ids)


def _lookup_backward(options, saved, cotangent):
    axes, _, block_size = options
    of_ids, of_table = streaming.query_spec(axes), streaming.table_spec(axes)

    def local(part, ids, cotangent):
        table, flat = streaming.Table(part, axes), _own_ids(ids, part.shape[0], axes)
        cotangent = cotangent.reshape(flat.size, -1).astype(jnp.float32)

        def step(start, size, gradient):
            # Ids outside the block are sent behind its end, and dropped.
            place = jnp.where((flat >= start) & (flat < start + size), flat - start, size)
            block = jnp.zeros((size, table.width)).at[place].add(cotangent, mode="drop")
            return table.put_gradient(gradient, start, block)

        gradient = jnp.zeros(part.shape)  # of the table itself, only the shape is read
        gradient = streaming.stream(step, gradient, num_rows=table.num_rows, block_size=block_size)
        return streaming.add_up(gradient, axes.queries_only).astype(part.dtype)

    return streaming.shard(local, axes, (of_table, of_ids, of_ids), of_table)(*saved, cotangent), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _own_ids(ids, num_rows: int, axes: streaming.VocabularyMesh) -> Int[Array, " n"]:
    """The ids, flat, counted from this device's first row; those of other devices' rows are outside of it."""
    first = jax.lax.axis_index(axes.vocabulary) * num_rows if axes.vocabulary else 0
    return ids.reshape(-1) - first
