"""Mean and variance of a query's logits over the vocabulary, for the LayerNorm between logits and softmax.

Axes: T queries, V vocabulary, D width of a row, K rows in a block.

Computed directly, they require all V logits before the first one can be normalized. The mean row w̄ of the table and its
covariance C = (W - w̄)ᵀ(W - w̄)/V give them without any logit:

    mean over v of q·w_v     = q·w̄
    variance over v of q·w_v = qᵀ C q

C costs V D² multiplications, of which only about half are done, because C is symmetric. A second pass over the table
costs V T D. T decides which of the two is cheaper (`covariance_is_cheaper`). For a frozen table, C is computed once and
kept. Each of the devices that share the columns of the table sums C over some of its rows (`Table.to_row_shards`).
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops import vocabulary_streaming as streaming

_PANELS = 4
_PANEL_WIDTH = 128


@flax.struct.dataclass
class VocabularyStatistics:
    """Statistics of the rows of a table, in float32. For a frozen table, keep them instead of recomputing them.

    Attributes:
      mean: w̄.
      covariance: C, of the population (divided by V).
    """

    mean: Float[Array, " D"]
    covariance: Float[Array, "D D"]

    def moments(
        self, q: Float[Array, "... D"]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "... D"]]:
        """Returns mean and variance of the logits of queries, and C q, in float32."""
        q = q.astype(jnp.float32)
        # By default, a TPU would round both factors to bfloat16. HIGH takes three passes, which is affordable: this
        # product is only T D² of about V T D multiplications.
        spread = jnp.dot(q, self.covariance, precision=jax.lax.Precision.HIGH)
        return q @ self.mean, jnp.maximum(jnp.sum(q * spread, axis=-1), 0.0), spread


@ordinary_modes()
def vocabulary_statistics(
    keys: Float[Array, "V D"],
    *,
    dtype: str | None = None,
    mesh_axes: streaming.VocabularyMesh = streaming.UNSHARDED,
) -> VocabularyStatistics:
    """Returns the statistics of a table for `vocabulary_attention(..., statistics=...)`.

    Args:
      keys: a row for each word.
      dtype: dtype of the queries, to which the table is cast for the logits; None means the dtype of the table.
      mesh_axes: axes of the current mesh that split the table.
    """
    axes = streaming.resolve(mesh_axes, num_queries=1, num_rows=keys.shape[0], widths=keys.shape[1:])

    def local(part):
        table = streaming.Table(part, axes)
        mean = mean_row(table, dtype or keys.dtype)
        block_size = streaming.default_block_size(table.width)
        return VocabularyStatistics(mean, centered_covariance(table, mean, dtype or keys.dtype, block_size))

    return streaming.shard(local, axes, streaming.table_spec(axes), jax.P())(keys)


def covariance_is_cheaper(num_queries: int, width: int, num_width_shards: int = 1) -> bool:
    """Returns whether the covariance needs fewer multiplications than a second pass over the table.

    The covariance needs V D² / 2 (forward) + V D² (backward), shared by f devices, and a second pass V T D + V T D. The
    backward terms are those of `vocabulary_attention`: with the covariance, one product of the table with a D x D
    matrix; without it, one more mixture of the values in the forward pass. At equal cost, the covariance takes less
    time, because its products involve no softmax.

    Args:
      num_queries: T.
      width: D.
      num_width_shards: f, the number of devices that share the columns of the table.
    """
    # 3/2 V D² / f <= 2 V T D, multiplied by 2 f / (V D).
    return 3 * width <= 4 * num_queries * num_width_shards


def mean_row(keys: streaming.Table, dtype: DTypeLike) -> Float[Array, " D"]:
    """Returns w̄ over the rows of all devices, in float32."""
    # Round to the dtype of the logits first, because it must be the mean of the rows as the logits use them.
    total = jnp.sum(keys.part.astype(dtype), axis=0, dtype=jnp.float32)
    total = streaming.all_reduce(total, keys.axes.vocabulary) / keys.num_global_rows
    return streaming.all_gather(total, keys.axes.widths, axis=0)


def centered_rows(
    row_shard: streaming.Table,
    num_real: Array | int,
    mean: Float[Array, " D"],
    start: Array | int,
    size: int,
    dtype: DTypeLike,
) -> Float[Array, "K D"]:
    """Returns a block of rows minus the mean row, with zeros for padding rows.

    Args:
      row_shard: result of `Table.to_row_shards`.
      num_real: number of its rows that are not padding.
      mean: w̄.
      start: first row of the block.
      size: K.
      dtype: dtype of the result.
    """
    rows = row_shard.read_block(start, size, dtype).astype(jnp.float32) - mean
    if not isinstance(num_real, int):
        # Row shards may end with padding, whose rows must not become -mean.
        rows = jnp.where((start + jnp.arange(size) < num_real)[:, None], rows, 0.0)
    # Center before rounding again, because a large mean would otherwise dominate the products.
    return rows.astype(dtype)


def centered_covariance(
    keys: streaming.Table, mean: Float[Array, " D"], dtype: DTypeLike, block_size: int
) -> Float[Array, "D D"]:
    """Returns C in float32.

    Only the panels on and above the diagonal are computed. With four panels, these are 5/8 of all products:

        panel   0 0 0 0
                  1 1 1
                    2 2
                      3

    Args:
      keys: the table.
      mean: w̄.
      dtype: dtype of the products.
      block_size: K.
    """
    width = keys.width
    # Narrow tables use a single panel: smaller matrix products would not be faster.
    panels = _PANELS if width % _PANELS == 0 and width >= _PANELS * _PANEL_WIDTH else 1
    starts = [width // panels * panel for panel in range(panels)]
    stops = [*starts[1:], width]
    row_shard, num_real = keys.to_row_shards(dtype)

    def step(start, size, sums):
        # Panel i is the product of its own columns with all columns from its first one on.
        rows = centered_rows(row_shard, num_real, mean, start, size, dtype)
        return [
            total + streaming.dot(rows[:, first:stop].T, rows[:, first:])
            for total, first, stop in zip(sums, starts, stops, strict=True)
        ]

    zeros = [jnp.zeros((stop - first, width - first)) for first, stop in zip(starts, stops, strict=True)]
    sums = streaming.stream(step, zeros, num_rows=row_shard.num_rows, block_size=block_size)
    # Put the panels together, then mirror the upper triangle.
    upper = jnp.concatenate([jnp.pad(total, ((0, 0), (first, 0))) for total, first in zip(sums, starts, strict=True)])
    covariance = jnp.triu(upper) + jnp.triu(upper, 1).T
    return streaming.all_reduce(covariance, keys.axes.vocabulary + keys.axes.widths) / keys.num_global_rows


def streamed_variance(
    q: Float[Array, "T D"], keys: streaming.Table, mean_logit: Float[Array, " T"], block_size: int
) -> Float[Array, " T"]:
    """Returns the variance of the logits, from a pass over the table."""

    def step(start, size, total):
        logits = streaming.dot(q, keys.read_block(start, size, q.dtype).T)
        # The mean is known, so no large terms cancel as in E[x²] - E[x]².
        return total + jnp.sum((logits - mean_logit[:, None]) ** 2, axis=-1)

    zeros = jnp.zeros((q.shape[0],))
    total = streaming.stream(step, zeros, num_rows=keys.num_rows, block_size=block_size)
    return streaming.all_reduce(total, keys.axes.vocabulary) / keys.num_global_rows
