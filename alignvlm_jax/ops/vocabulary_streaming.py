"""Streams over the rows of a vocabulary table, one block at a time; used by ALIGN, the embedding and the loss.

No array of all queries and all words (T x V) is ever held.

Axes: T queries, V vocabulary, D width of a row, Dv value width, K rows in a block; t and f, number of devices over
which the rows of a table and its width are split.

A pass works like flash attention over keys. `stream` iterates over the blocks. `RunningSoftmax` keeps the largest score
so far and the sum of exponentials relative to it; whenever the largest score rises, all sums weighted by these
exponentials are rescaled (Milakov & Gimelshein, arXiv 1805.02867; Rabe & Staats, arXiv 2112.05682).

On a mesh, `shard` splits the vocabulary over some axes and the queries over others. Each device passes over its own
rows only, and the results are summed over the axes that split the vocabulary. The width of the tables may be split over
axes that also split the queries (weights sharded as in FSDP). A `Table` then gathers a block when it is used, and
reduces the gradient of a block as soon as it is known, so no device ever holds a complete table.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from alignvlm_jax.ops import gradient_dtype

Carry = TypeVar("Carry")
Tree = TypeVar("Tree")

LOWEST = -1e30
"""Initial maximum: below every score, and finite, so that the difference of two such maxima is 0 instead of NaN."""

_BLOCK_ROWS = (256, 4096)  # smallest and largest K of a pass with gradient
_BLOCK_ELEMENTS = 1 << 26  # largest number of scores of a block, T x K: 256 MB in float32


def default_block_size(num_queries: int, *, inference: bool = False) -> int:
    """Returns K: 4096 rows, or fewer if the scores of a block would exceed 256 MB in float32, but at least 256.

    Every block reads and writes the sums of all queries, T x D. With 4096 rows, a TPU is still compute-bound. On a CPU,
    the time hardly depends on K. The measurements are in docs/vocabulary.md.

    Args:
      num_queries: T.
      inference: whether this is a forward pass without gradient on an accelerator. All limits then double: a forward
        pass alone does less arithmetic for each sum that it moves, and a v6e is compute-bound from 8192 rows on.
    """
    smallest, largest = _BLOCK_ROWS
    factor = 2 if inference else 1
    fitting = max(1, factor * _BLOCK_ELEMENTS // max(1, num_queries))
    # The largest power of two that fits.
    return min(factor * largest, max(smallest, 1 << (fitting.bit_length() - 1)))


def stream(step: Callable[[Array | int, int, Carry], Carry], carry: Carry, *, num_rows: int, block_size: int) -> Carry:
    """Folds `carry = step(start, size, carry)` over blocks of rows: a loop over full blocks, then the smaller last one.

    With num_rows=10 and block_size=4, for example, a loop runs step(0, 4, .) and step(4, 4, .). Then step(8, 2, .) is
    traced with a shape of its own, so no rows need padding.
    """
    full, ragged = divmod(num_rows, block_size)
    if full == 1:
        # A loop of one iteration would only hide the static start from the compiler.
        carry = step(0, block_size, carry)
    elif full:
        carry = jax.lax.fori_loop(0, full, lambda i, carry: step(i * block_size, block_size, carry), carry)
    return step(full * block_size, ragged, carry) if ragged else carry


def slice_block(
    rows: Float[Array, "V ..."], start: Array | int, size: int, dtype: DTypeLike | None = None
) -> Float[Array, "K ..."]:
    """Returns a block of rows, cast to `dtype` unless that is None."""
    return jax.lax.dynamic_slice_in_dim(rows, start, size).astype(dtype or rows.dtype)


def update_block(
    rows: Float[Array, "V ..."], start: Array | int, block: Float[Array, "K ..."]
) -> Float[Array, "V ..."]:
    """Returns the rows with one block replaced. Inside a loop, XLA does this in place."""
    return jax.lax.dynamic_update_slice_in_dim(rows, block.astype(rows.dtype), start, 0)


def dot(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Returns a matrix product in float32, regardless of the dtype of its inputs."""
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class RunningSoftmax:
    """A softmax over the rows seen so far, in float32.

    Attributes:
      maximum: m, the largest score.
      total: sum of exp(score - m).
    """

    maximum: Float[Array, " T"]
    total: Float[Array, " T"]

    @classmethod
    def empty(cls, num_queries: int) -> "RunningSoftmax":
        """Returns the state before the first block."""
        return cls(jnp.full((num_queries,), LOWEST), jnp.zeros((num_queries,)))

    def update(self, scores: Float[Array, "T K"]) -> tuple["RunningSoftmax", Float[Array, "T K"], Float[Array, "T 1"]]:
        """Adds the scores of a block.

        Returns:
          The new state, exp(score - m) of the block, and the factor by which sums of earlier blocks must be multiplied.
        """
        # Everything is relative to the largest score so far, so exp cannot overflow.
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - maximum[:, None])
        decay = jnp.exp(self.maximum - maximum)
        return RunningSoftmax(maximum, self.total * decay + jnp.sum(weights, axis=-1)), weights, decay[:, None]

    def shared_maximum(self, axis_names: tuple[str, ...]) -> Float[Array, " T"]:
        """Returns the largest score over the devices along the mesh axes that split the vocabulary."""
        return jax.lax.pmax(self.maximum, axis_names) if axis_names else self.maximum

    def merge(
        self,
        maximum: Float[Array, " T"],
        weighted: dict[str, Float[Array, "T _"]],
        plain: dict[str, Float[Array, "T _"]],
        axis_names: tuple[str, ...],
    ) -> tuple["RunningSoftmax", dict[str, Float[Array, "T _"]]]:
        """Merges the states and sums of all devices that share the vocabulary, in one all-reduce.

        Args:
          maximum: the `shared_maximum`.
          weighted: sums weighted by exp(score - m), with m the largest score of this device.
          plain: other sums.
          axis_names: mesh axes that split the vocabulary.

        Returns:
          The softmax over all rows, and all sums.
        """
        # Rescale from the maximum of this device to the maximum of all.
        decay = jnp.exp(self.maximum - maximum)[:, None]
        weighted = {"_total": self.total[:, None], **weighted}
        sums = {name: decay * partial for name, partial in weighted.items()}
        sums = all_reduce_columns({**sums, **plain}, axis_names)
        return RunningSoftmax(maximum, sums.pop("_total")[:, 0]), sums

    def probabilities(self, scores: Float[Array, "T K"]) -> Float[Array, "T K"]:
        """Returns the probabilities of a block, given its scores, after all blocks were added."""
        # exp(score - log Z) would be less exact, because the rounding error of log Z grows with the scores.
        return jnp.exp(scores - self.maximum[:, None]) * (1 / self.total)[:, None]


def all_reduce(partial: Tree, axis_names: tuple[str, ...]) -> Tree:
    """Sums every array of a tree over the devices along some mesh axes; without axes, returns the tree unchanged."""
    return jax.lax.psum(partial, axis_names) if axis_names else partial


def all_reduce_gradient(gradient: Float[Array, "V/t D/f"], axis_names: tuple[str, ...]) -> Float[Array, "V/t D/f"]:
    """Sums the gradient of a table over the devices along some mesh axes, which exchange it in `exchanged_dtype()`."""
    if not axis_names:
        return gradient
    return gradient_dtype.exchange(lambda gradient: jax.lax.psum(gradient, axis_names), gradient)


def all_reduce_columns(
    partial: dict[str, Float[Array, "T _"]], axis_names: tuple[str, ...]
) -> dict[str, Float[Array, "T _"]]:
    """Applies `all_reduce` to arrays with the same number of rows, in a single collective."""
    if not axis_names:
        return partial
    # One collective for the concatenated columns, instead of one for each array.
    stops = np.cumsum([array.shape[1] for array in partial.values()])
    total = jax.lax.psum(jnp.concatenate(list(partial.values()), axis=1), axis_names)
    return dict(zip(partial, jnp.split(total, stops[:-1], axis=1), strict=True))


def all_gather(array: Array, axis_names: tuple[str, ...], axis: int) -> Array:
    """Concatenates the parts of all devices along some mesh axes; without axes, returns the array unchanged."""
    return jax.lax.all_gather(array, axis_names, axis=axis, tiled=True) if axis_names else array


@dataclasses.dataclass(frozen=True)
class VocabularyMesh:
    """Names of the mesh axes that split queries and tables.

    Axes that the current mesh lacks, or that do not divide the size they should split, have no effect.

    Attributes:
      queries: axes that split the first axis of the queries.
      vocabulary: axes that split the rows of the tables.
      widths: axes that split the width of the tables; used only if they split the queries as well.
    """

    queries: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()

    @property
    def queries_only(self) -> tuple[str, ...]:
        """Axes along which devices have different queries, but the same part of the tables."""
        return tuple(axis for axis in self.queries if axis not in self.widths)


UNSHARDED = VocabularyMesh()


def resolve(mesh_axes: VocabularyMesh, *, num_queries: int, num_rows: int, widths: tuple[int, ...]) -> VocabularyMesh:
    """Returns the axes of `mesh_axes` that the current mesh (`jax.set_mesh`) has and that divide what they split.

    Args:
      mesh_axes: axes from the sharding rules.
      num_queries: length of the first axis of the queries.
      num_rows: number of rows of the tables.
      widths: widths of the tables.
    """
    sizes = jax.sharding.get_abstract_mesh().shape

    def keep(axes, size):
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()

    # A split width works only over axes that also split the queries: the gradient of a block is then a sum over the
    # devices that share its columns, since each has other queries.
    queries, width_axes = keep(mesh_axes.queries, num_queries), keep(mesh_axes.widths, math.gcd(*widths))
    return VocabularyMesh(
        queries, keep(mesh_axes.vocabulary, num_rows), width_axes if set(width_axes) <= set(queries) else ()
    )


def shard(function: Callable, axes: VocabularyMesh, in_specs, out_specs) -> Callable:
    """Returns `function` mapped over the queries and rows of each device, or `function` itself on a single device.

    Args:
      function: works on the part of one device.
      axes: result of `resolve`.
      in_specs: specs of the arguments, made of `query_spec`, `row_spec`, `table_spec` and P().
      out_specs: specs of the results.
    """
    if not axes.queries and not axes.vocabulary:
        return function
    # No check of replication: `function` contains its sums over the vocabulary and over the queries explicitly.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def query_spec(axes: VocabularyMesh) -> P:
    """Returns the PartitionSpec of an array whose first axis is the queries' axis."""
    return P(axes.queries or None)


def row_spec(axes: VocabularyMesh) -> P:
    """Returns the spec of a vector with an entry for each word."""
    return P(axes.vocabulary or None)


def table_spec(axes: VocabularyMesh) -> P:
    """Returns the spec of a table with a row for each word."""
    return P(axes.vocabulary or None, axes.widths or None)


@dataclasses.dataclass(frozen=True)
class Table:
    """Part of a table on one device: some of its rows, and some of their columns.

    Attributes:
      part: the values on this device.
      axes: mesh axes that split the table.
    """

    part: Float[Array, "V/t D/f"]
    axes: VocabularyMesh = UNSHARDED

    @property
    def num_rows(self) -> int:
        """V/t, the number of rows on this device."""
        return self.part.shape[0]

    @property
    def num_global_rows(self) -> int:
        """V, the number of rows on all devices."""
        return self.num_rows * (jax.lax.axis_size(self.axes.vocabulary) if self.axes.vocabulary else 1)

    @property
    def width(self) -> int:
        """D, the number of columns on all devices."""
        return self.part.shape[1] * self.num_width_shards

    @property
    def num_width_shards(self) -> int:
        """f, the number of devices that share the columns."""
        return jax.lax.axis_size(self.axes.widths) if self.axes.widths else 1

    def read_block(self, start: Array | int, size: int, dtype: DTypeLike) -> Float[Array, "K D"]:
        """Returns a block of rows with all columns, cast to `dtype`."""
        # Cast before gathering, so that fewer bytes are sent.
        block = slice_block(self.part, start, size, dtype)
        return all_gather(block, self.axes.widths, axis=1)

    def to_row_shards(self, dtype: DTypeLike) -> tuple["Table", Array | int]:
        """Redistributes the rows of this device over the devices that share their columns.

        Returns:
          The rows that this device gets, with all columns, and the number of rows that are not padding. The last
          devices may get padding.
        """
        if not self.axes.widths:
            return self, self.num_rows
        rows_per_device = -(-self.num_rows // self.num_width_shards)
        padding = rows_per_device * self.num_width_shards - self.num_rows
        rows = jnp.pad(self.part.astype(dtype), ((0, padding), (0, 0)))
        # From all rows of D/f columns to 1/f of the rows with D columns.
        rows = jax.lax.all_to_all(rows, self.axes.widths, split_axis=0, concat_axis=1, tiled=True)
        num_before = rows_per_device * jax.lax.axis_index(self.axes.widths)
        return Table(rows), jnp.clip(self.num_rows - num_before, 0, rows_per_device)

    def from_row_shards(self, rows: Float[Array, "share D"]) -> Float[Array, "V/t D/f"]:
        """Inverts `to_row_shards`: from some rows with all columns to all rows with this device's columns."""
        if not self.axes.widths:
            return rows
        columns = jax.lax.all_to_all(rows, self.axes.widths, split_axis=1, concat_axis=0, tiled=True)
        return columns[: self.num_rows]

    def local_columns(self, row: Float[Array, " D"]) -> Float[Array, " D/f"]:
        """Returns the part of a row that belongs to this device's columns."""
        if not self.axes.widths:
            return row
        size = self.part.shape[1]
        return jax.lax.dynamic_slice_in_dim(row, jax.lax.axis_index(self.axes.widths) * size, size)

    def update_gradient(
        self, gradient: Float[Array, "V/t D/f"], start: Array | int, block: Float[Array, "K D"]
    ) -> Float[Array, "V/t D/f"]:
        """Stores the gradient of a block in `gradient`, summed over the devices that share its columns."""
        if self.axes.widths:
            # A reduce-scatter: each device gets the sum over all queries, for its columns only.
            block = gradient_dtype.exchange(
                lambda block: jax.lax.psum_scatter(block, self.axes.widths, scatter_dimension=1, tiled=True), block
            )
        return update_block(gradient, start, block)
