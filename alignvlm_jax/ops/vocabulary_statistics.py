"""Mean and variance of a query's logits over the vocabulary: what the LayerNorm between logits and softmax needs.

Axes: T queries, V vocabulary, D width of a row, K rows in a block.

They seem to need all V logits before the first one can be normalised. With w̄ the mean row of the table and
C = (W - w̄)ᵀ(W - w̄)/V they do not:

    mean over v of q·w_v     = q·w̄
    variance over v of q·w_v = qᵀ C q

C costs V D² multiplications, about half of it here because C is symmetric; another pass over the table costs V T D. So
which one is cheaper depends on T (`covariance_is_cheaper`), and where the table is frozen, C is computed once and kept.
Devices that share the table's columns (`Table.share`) each compute C of a share of its rows.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from alignvlm_jax.ops import vocabulary_streaming as streaming

_PANELS = 4
_PANEL_WIDTH = 128


@flax.struct.dataclass
class VocabularyStatistics:
    """Of the rows of a table, float32. Kept for a frozen table, they save the computation of them at every call.

    Attributes:
      mean: w̄.
      covariance: C, of the population (divided by V).
    """

    mean: Float[Array, " D"]
    covariance: Float[Array, "D D"]

    def moments(
        self, q: Float[Array, "... D"]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "... D"]]:
        """Mean and variance of the logits of queries, and C q; float32."""
        q = q.astype(jnp.float32)
        # The TPU's default would round both to bfloat16; T D² of V T D multiplications may cost three times as much.
        spread = jnp.dot(q, self.covariance, precision=jax.lax.Precision.HIGH)
        return q @ self.mean, jnp.maximum(jnp.sum(q * spread, axis=-1), 0.0), spread


def vocabulary_statistics(
    keys: Float[Array, "V D"],
    *,
    dtype: str | None = None,
    mesh_axes: streaming.VocabularyMesh = streaming.UNSHARDED,
) -> VocabularyStatistics:
    """Statistics of a table for `vocabulary_attention(..., statistics=...)`.

    Args:
      keys: the table.
      dtype: that of the queries it will meet: logits are products of the table cast to it. None means its own.
      mesh_axes: which axes of the mesh in force cut its rows.
    """
    axes = streaming.resolve(mesh_axes, num_queries=1, num_rows=keys.shape[0], widths=keys.shape[1:])

    def local(part):
        table = streaming.Table(part, axes)
        mean = mean_row(table, dtype or keys.dtype)
        block_size = streaming.default_block_size(table.width)
        return VocabularyStatistics(mean, centred_covariance(table, mean, dtype or keys.dtype, block_size))

    return streaming.shard(local, axes, streaming.table_spec(axes), jax.P())(keys)


def covariance_is_cheaper(num_queries: int, width: int, num_parts: int = 1) -> bool:
    """Whether V D² / 2 (forward) + V D² (backward), shared by f devices, are fewer multiplications than V T D + V T D.

    The backward terms are those of `vocabulary_attention`: with the covariance, one product of the table with a D x D
    matrix; without, one more mixture of the values in the forward pass. Close to equality the covariance wins on time:
    its products have no softmax in them.
    """
    return 3 * width <= 4 * num_queries * num_parts


def mean_row(keys: streaming.Table, dtype: DTypeLike) -> Float[Array, " D"]:
    """w̄, float32, over the rows of all devices."""
    total = jnp.sum(keys.part.astype(dtype), axis=0, dtype=jnp.float32)
    total = streaming.add_up(total, keys.axes.vocabulary) / keys.all_rows
    return streaming.gather(total, keys.axes.widths, axis=0)


def centred_rows(
    share: streaming.Table,
    num_real: Array | int,
    mean: Float[Array, " D"],
    start: Array | int,
    size: int,
    dtype: DTypeLike,
) -> Float[Array, "K D"]:
    """A block of a `Table.share` less the mean row; zeros where the rows are not real.

    It is centred before it is rounded to `dtype` again: products of it then carry no large mean.
    """
    rows = share.take(start, size, dtype).astype(jnp.float32) - mean
    if not isinstance(num_real, int):
        rows = jnp.where((start + jnp.arange(size) < num_real)[:, None], rows, 0.0)
    return rows.astype(dtype)


def centred_covariance(
    keys: streaming.Table, mean: Float[Array, " D"], dtype: DTypeLike, block_size: int
) -> Float[Array, "D D"]:
    """C, float32. Only panels on and above the diagonal are computed: 5/8 of the products, for four panels.

    panels of 4:  0 0 0 0
                    1 1 1
                      2 2
                        3
    """
    width = keys.width
    panels = _PANELS if width % _PANELS == 0 and width >= _PANELS * _PANEL_WIDTH else 1
    starts = [width // panels * panel for panel in range(panels)]
    stops = [*starts[1:], width]
    share, num_real = keys.share(dtype)

    def step(start, size, sums):
        rows = centred_rows(share, num_real, mean, start, size, dtype)
        return [
            total + streaming.dot(rows[:, first:stop].T, rows[:, first:])
            for total, first, stop in zip(sums, starts, stops, strict=True)
        ]

    zeros = [jnp.zeros((stop - first, width - first)) for first, stop in zip(starts, stops, strict=True)]
    sums = streaming.stream(step, zeros, num_rows=share.num_rows, block_size=block_size)
    upper = jnp.concatenate([jnp.pad(total, ((0, 0), (first, 0))) for total, first in zip(sums, starts, strict=True)])
    covariance = jnp.triu(upper) + jnp.triu(upper, 1).T
    return streaming.add_up(covariance, keys.axes.vocabulary + keys.axes.widths) / keys.all_rows


def streamed_variance(
    q: Float[Array, "T D"], keys: streaming.Table, mean_logit: Float[Array, " T"], block_size: int
) -> Float[Array, " T"]:
    """Variance of the logits by a pass over the table; the mean is known already, so nothing large cancels."""

    def step(start, size, total):
        logits = streaming.dot(q, keys.take(start, size, q.dtype).T)
        return total + jnp.sum((logits - mean_logit[:, None]) ** 2, axis=-1)

    zeros = jnp.zeros((q.shape[0],))
    total = streaming.stream(step, zeros, num_rows=keys.num_rows, block_size=block_size)
    return streaming.add_up(total, keys.axes.vocabulary) / keys.all_rows
