"""What ALIGN and the loss share: one pass over the rows of a vocabulary table, never holding T x V of anything.

Axes: T queries, V vocabulary, D width of a row, Dv value width, K rows in a block; t and f, over how many devices the
rows of a table and its width are cut.

A pass works like flash attention over keys: `stream` hands out the blocks, `RunningSoftmax` keeps the largest score so
far, the sum of exponentials relative to it, and what is mixed by them (Milakov & Gimelshein, arXiv 1805.02867;
Rabe & Staats, arXiv 2112.05682).

Where a mesh is set, `shard` cuts the vocabulary over some of its axes and the queries over others: each device passes
over its own rows only, and what they found is added up over `across`, the axes that cut the vocabulary. The width of
the tables may lie over axes that cut the queries too (weights sharded as in FSDP): a `Table` then gathers a block when
it is used and adds up a block's gradient as soon as that is known, so no device ever holds a table whole.
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

Carry = TypeVar("Carry")
Tree = TypeVar("Tree")

LOWEST = -1e30
"""Below every score, and finite: the difference of two such maxima is 0, not NaN."""

_BLOCK_ROWS = (256, 4096)
_BLOCK_ELEMENTS = 1 << 26


def default_block_size(num_queries: int, *, inference: bool = False) -> int:
    """K: 4096 rows, fewer where the scores of a block would fill more than 256 MB in float32, but at least 256.

    Every block reads and writes the sums of all queries, T x D; with 4096 rows a TPU is bound by arithmetic all the
    same. A CPU's time hardly depends on K. The figures are in docs/vocabulary.md.

    Args:
      num_queries: T.
      inference: whether no gradient will follow, on an accelerator. Twice the rows and the bytes then: a forward pass
        alone does less arithmetic for each sum that it moves, and a v6e is bound by arithmetic from 8192 rows on.
    """
    smallest, largest = _BLOCK_ROWS
    factor = 2 if inference else 1
    fitting = max(1, factor * _BLOCK_ELEMENTS // max(1, num_queries))
    return min(factor * largest, max(smallest, 1 << (fitting.bit_length() - 1)))


def stream(step: Callable[[Array | int, int, Carry], Carry], carry: Carry, *, num_rows: int, block_size: int) -> Carry:
    """Folds `carry = step(start, size, carry)` over blocks of rows: full ones in a loop, then the ragged last one.

    before: num_rows=10, block_size=4
    after:  step(0, 4, .), step(4, 4, .) in one loop, step(8, 2, .) behind it, in its own shape: no row is padding
    """
    full, ragged = divmod(num_rows, block_size)
    if full == 1:
        carry = step(0, block_size, carry)
    elif full:
        carry = jax.lax.fori_loop(0, full, lambda i, carry: step(i * block_size, block_size, carry), carry)
    return step(full * block_size, ragged, carry) if ragged else carry


def take(
    rows: Float[Array, "V ..."], start: Array | int, size: int, dtype: DTypeLike | None = None
) -> Float[Array, "K ..."]:
    """A block of rows, cast to `dtype` (None: left as they are)."""
    return jax.lax.dynamic_slice_in_dim(rows, start, size).astype(dtype or rows.dtype)


def put(rows: Float[Array, "V ..."], start: Array | int, block: Float[Array, "K ..."]) -> Float[Array, "V ..."]:
    """The rows with a block of them replaced; in a loop XLA does so in place."""
    return jax.lax.dynamic_update_slice_in_dim(rows, block.astype(rows.dtype), start, 0)


def dot(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """A matrix product with a float32 result, whatever the dtype of its inputs."""
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class RunningSoftmax:
    """A softmax over the rows passed so far, float32.

    Attributes:
      maximum: m, the largest score.
      total: sum of exp(score - m).
    """

    maximum: Float[Array, " T"]
    total: Float[Array, " T"]

    @classmethod
    def empty(cls, num_queries: int) -> "RunningSoftmax":
        """Before the first block."""
        return cls(jnp.full((num_queries,), LOWEST), jnp.zeros((num_queries,)))

    def update(self, scores: Float[Array, "T K"]) -> tuple["RunningSoftmax", Float[Array, "T K"], Float[Array, "T 1"]]:
        """Takes in a block; returns its exp(score - m) too, and what sums of earlier blocks are to be multiplied by."""
        maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - maximum[:, None])
        decay = jnp.exp(self.maximum - maximum)
        return RunningSoftmax(maximum, self.total * decay + jnp.sum(weights, axis=-1)), weights, decay[:, None]

    def shared_maximum(self, across: tuple[str, ...]) -> Float[Array, " T"]:
        """The largest score of all devices that share the vocabulary."""
        return jax.lax.pmax(self.maximum, across) if across else self.maximum

    def merge(
        self,
        maximum: Float[Array, " T"],
        weighted: dict[str, Float[Array, "T _"]],
        plain: dict[str, Float[Array, "T _"]],
        across: tuple[str, ...],
    ) -> tuple["RunningSoftmax", dict[str, Float[Array, "T _"]]]:
        """Over all devices that share the vocabulary, in one all-reduce.

        Args:
          maximum: the `shared_maximum`.
          weighted: sums weighted by exp(score - m), m this device's largest score.
          plain: other sums.
          across: the axes that cut the vocabulary.

        Returns:
          The softmax over all rows, and all sums.
        """
        decay = jnp.exp(self.maximum - maximum)[:, None]
        weighted = {"_total": self.total[:, None], **weighted}
        sums = {name: decay * partial for name, partial in weighted.items()}
        sums = add_up_columns({**sums, **plain}, across)
        return RunningSoftmax(maximum, sums.pop("_total")[:, 0]), sums

    def probabilities(self, scores: Float[Array, "T K"]) -> Float[Array, "T K"]:
        """Of scores of a block, when all blocks were passed. Not exp(score - log Z): that rounds like a large score."""
        return jnp.exp(scores - self.maximum[:, None]) * (1 / self.total)[:, None]


def add_up(partial: Tree, across: tuple[str, ...]) -> Tree:
    """The sum over the devices of some mesh axes, of every array of a tree; without axes, what was given."""
    return jax.lax.psum(partial, across) if across else partial


def add_up_columns(partial: dict[str, Float[Array, "T _"]], across: tuple[str, ...]) -> dict[str, Float[Array, "T _"]]:
    """`add_up` of arrays with the same rows, as one all-reduce."""
    if not across:
        return partial
    stops = np.cumsum([array.shape[1] for array in partial.values()])
    total = jax.lax.psum(jnp.concatenate(list(partial.values()), axis=1), across)
    return dict(zip(partial, jnp.split(total, stops[:-1], axis=1), strict=True))


@dataclasses.dataclass(frozen=True)
class VocabularyMesh:
    """Names of mesh axes; those that the mesh in force lacks, or that do not divide what they cut, cut nothing.

    Attributes:
      queries: axes that cut the first axis of the queries.
      vocabulary: axes that cut the rows of the tables.
      widths: axes that cut the width of the tables; only where they cut the queries as well.
    """

    queries: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()

    @property
    def queries_only(self) -> tuple[str, ...]:
        """The axes along which devices have other queries, but the same part of the tables."""
        return tuple(axis for axis in self.queries if axis not in self.widths)


UNSHARDED = VocabularyMesh()


def resolve(mesh_axes: VocabularyMesh, *, num_queries: int, num_rows: int, widths: tuple[int, ...]) -> VocabularyMesh:
    """What of `mesh_axes` the mesh in force (`jax.set_mesh`) can cut: an axis that does not divide leaves it whole.

    Args:
      mesh_axes: as the sharding rules have it.
      num_queries: length of the queries' first axis.
      num_rows: of the tables.
      widths: of the tables.
    """
    sizes = jax.sharding.get_abstract_mesh().shape

    def keep(axes, size):
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()

    queries, of_widths = keep(mesh_axes.queries, num_queries), keep(mesh_axes.widths, math.gcd(*widths))
    return VocabularyMesh(
        queries, keep(mesh_axes.vocabulary, num_rows), of_widths if set(of_widths) <= set(queries) else ()
    )


def shard(function: Callable, axes: VocabularyMesh, in_specs, out_specs) -> Callable:
    """`function` on each device's queries and rows; on one device, `function` itself.

    `axes` come from `resolve`. The specs are made of `query_spec`, `row_spec`, `table_spec` and P().
    """
    if not axes.queries and not axes.vocabulary:
        return function
    # Replication is not checked: psum over `across` and over the queries' axes is written out by hand.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def query_spec(axes: VocabularyMesh) -> P:
    """Of an array whose first axis is that of the queries."""
    return P(axes.queries or None)


def row_spec(axes: VocabularyMesh) -> P:
    """Of a vector with an entry for each word."""
    return P(axes.vocabulary or None)


def table_spec(axes: VocabularyMesh) -> P:
    """Of a table with a row for each word."""
    return P(axes.vocabulary or None, axes.widths or None)


@dataclasses.dataclass(frozen=True)
class Table:
    """What a device has of a table: its rows, and of each row its columns."""

    part: Float[Array, "V/t D/f"]
    axes: VocabularyMesh = UNSHARDED

    @property
    def num_rows(self) -> int:
        """V/t: the rows of this device."""
        return self.part.shape[0]

    @property
    def all_rows(self) -> int:
        """V: the rows of all devices."""
        return self.num_rows * (jax.lax.axis_size(self.axes.vocabulary) if self.axes.vocabulary else 1)

    @property
    def width(self) -> int:
        """D."""
        return self.part.shape[1] * self.num_parts

    @property
    def num_parts(self) -> int:
        """f: how many devices share the columns."""
        return jax.lax.axis_size(self.axes.widths) if self.axes.widths else 1

    def take(self, start: Array | int, size: int, dtype: DTypeLike) -> Float[Array, "K D"]:
        """A block of rows, whole in width, cast to `dtype`; what travels is cast already."""
        block = take(self.part, start, size, dtype)
        return gather(block, self.axes.widths, axis=1)

    def share(self, dtype: DTypeLike) -> tuple["Table", Array | int]:
        """A share of this device's rows for each of the devices that share their columns, whole in width.

        Returns:
          The share and how many of its rows are real; those behind them fill up the last device's.
        """
        if not self.axes.widths:
            return self, self.num_rows
        each = -(-self.num_rows // self.num_parts)
        rows = jnp.pad(self.part.astype(dtype), ((0, each * self.num_parts - self.num_rows), (0, 0)))
        rows = jax.lax.all_to_all(rows, self.axes.widths, split_axis=0, concat_axis=1, tiled=True)
        return Table(rows), jnp.clip(self.num_rows - each * jax.lax.axis_index(self.axes.widths), 0, each)

    def from_share(self, rows: Float[Array, "share D"]) -> Float[Array, "V/t D/f"]:
        """Undoes `share`: from each device's rows to each device's columns."""
        if not self.axes.widths:
            return rows
        columns = jax.lax.all_to_all(rows, self.axes.widths, split_axis=1, concat_axis=0, tiled=True)
        return columns[: self.num_rows]

    def own_columns(self, row: Float[Array, " D"]) -> Float[Array, " D/f"]:
        """Of a row, the columns that this device has of the table."""
        if not self.axes.widths:
            return row
        size = self.part.shape[1]
        return jax.lax.dynamic_slice_in_dim(row, jax.lax.axis_index(self.axes.widths) * size, size)

    def put_gradient(
        self, gradient: Float[Array, "V/t D/f"], start: Array | int, block: Float[Array, "K D"]
    ) -> Float[Array, "V/t D/f"]:
        """`put` of a block's gradient, added up over the devices that share its columns."""
        if self.axes.widths:
            block = jax.lax.psum_scatter(block, self.axes.widths, scatter_dimension=1, tiled=True)
        return put(gradient, start, block)


def gather(array: Array, across: tuple[str, ...], axis: int) -> Array:
    """The parts of all devices along mesh axes, one behind the other; without axes, what was given."""
    return jax.lax.all_gather(array, across, axis=axis, tiled=True) if across else array
