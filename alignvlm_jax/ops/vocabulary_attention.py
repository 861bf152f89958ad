"""ALIGN as attention over the vocabulary: queries, keys and values, and a LayerNorm between scores and softmax.

    logits   l_tv = q_t·w_v                      w: rows of the keys
    LayerNorm    z_tv = r_t (l_tv - mu_t)        mu, 1/r² - eps: mean and variance over v
    scores   s_tv = scale_v z_tv + bias_v
    P        p_tv = exp(s_tv) / sum_v exp(s_tv)
    result   o_t  = sum_v p_tv e_v               e: rows of the values

Axes: T queries, D width, V vocabulary, Dv value width, K rows of the vocabulary in a block, k words of the largest P.

P is never held: forward and backward pass over the vocabulary a block at a time (`vocabulary_streaming.py`); mu and r
come from `vocabulary_statistics.py`. With d_tv = scale_v dL/ds_tv, a1_t = sum_v d_tv and a2_t = sum_v d_tv z_tv, the
LayerNorm's gradient is

    dL/dq_t = r_t (sum_v d_tv w_v - a1_t w̄ - a2_t r_t C q_t)
    dL/dw_v = sum_t r_t (d_tv - a1_t/V - a2_t/V z_tv) q_t
            = sum_t r_t d_tv q_t  -  sum_t r_t a1_t/V q_t  -  (sum_t r_t² a2_t/V q_t q_tᵀ) (w_v - w̄)

The derivation is in docs/vocabulary.md. a1 and a2 are sums over the whole vocabulary, known when the pass is over:

- with the covariance C at hand, their terms come after it, as products with D x D matrices;
- without (few queries), a2 is known before it: the forward pass also sums  h_t = sum_v p_tv scale_v z_tv e_v, of which
  a2_t = dL/do_t·h_t - (dL/do_t·o_t) sum_v p_tv scale_v z_tv.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignvlm_jax.ops import vocabulary_streaming as streaming
from alignvlm_jax.ops.vocabulary_statistics import (
    VocabularyStatistics,
    centered_covariance,
    centered_rows,
    covariance_is_cheaper,
    mean_row,
    streamed_variance,
)


@flax.struct.dataclass
class VocabularySummary:
    """What was asked of P besides the result; no gradient flows through it.

    Attributes:
      entropy: of each query's P, in nats; None if not asked for.
      top_probabilities: the k largest probabilities of each query, largest first; None if not asked for.
      top_ids: their words.
    """

    entropy: Float[Array, "..."] | None = None
    top_probabilities: Float[Array, "... k"] | None = None
    top_ids: Int[Array, "... k"] | None = None


def vocabulary_attention(
    q: Float[Array, "... D"],
    keys: Float[Array, "V D"],
    scale: Float[Array, " V"],
    bias: Float[Array, " V"],
    values: Float[Array, "V Dv"],
    *,
    eps: float = 1e-5,
    statistics: VocabularyStatistics | None = None,
    entropy: bool = False,
    top_k: int = 0,
    block_size: int | None = None,
    mesh_axes: streaming.VocabularyMesh = streaming.UNSHARDED,
) -> Float[Array, "... Dv"] | tuple[Float[Array, "... Dv"], VocabularySummary]:
    """`softmax(LayerNorm(q @ keys.T) * scale + bias) @ values` in memory that does not grow with T x V.

    Args:
      q: queries, of any leading shape; products are computed in their dtype, sums and statistics in float32.
      keys: a row for each word, cast to the dtype of `q` a block at a time.
      scale: of the LayerNorm.
      bias: of the LayerNorm.
      values: a row for each word, cast like the keys.
      eps: of the LayerNorm.
      statistics: of frozen keys (`vocabulary_statistics`): saves their computation. They are constants: the gradient of
        the keys does not flow through them. They may be those of another table, of which `keys` are some rows.
      entropy: whether to return the entropy of P.
      top_k: how many of the largest probabilities to return.
      block_size: K; None means `default_block_size`.
      mesh_axes: which axes of the mesh in force cut the first axis of `q`, the vocabulary, and the width of the tables.

    Returns:
      The result in the dtype of `q`; if anything was asked for beside it, a pair of it and a `VocabularySummary`.
    """
    num_queries = q.shape[0] if q.ndim > 1 else 1
    options = _Options(
        eps=eps,
        entropy=entropy,
        top_k=min(top_k, keys.shape[0]),
        block_size=block_size,
        axes=streaming.resolve(
            mesh_axes, num_queries=num_queries, num_rows=keys.shape[0], widths=(keys.shape[1], values.shape[1])
        ),
    )
    queries = q if q.ndim > 1 else q[None]
    mixed, summary = _attend(options, queries, keys, scale, bias, values, statistics)
    if q.ndim == 1:
        mixed, summary = mixed[0], jax.tree.map(lambda leaf: leaf[0], summary)
    return (mixed, summary) if entropy or top_k else mixed


def vocabulary_usage(
    q: Float[Array, "... D"],
    keys: Float[Array, "V D"],
    scale: Float[Array, " V"],
    bias: Float[Array, " V"],
    *,
    eps: float = 1e-5,
    statistics: VocabularyStatistics | None = None,
    weights: Float[Array, "..."] | None = None,
    block_size: int | None = None,
) -> Float[Array, " V"]:
    """How much each word is used: the sum over queries of weight * P, float32. One pass more than attention needs.

    Args:
      q: queries, of any leading shape.
      keys: as for `vocabulary_attention`, and so are `scale`, `bias`, `eps`, `statistics` and `block_size`.
      scale: of the LayerNorm.
      bias: of the LayerNorm.
      eps: of the LayerNorm.
      statistics: of frozen keys.
      weights: of the queries; None means 1.
      block_size: K.
    """
    flat = q.reshape(-1, q.shape[-1])
    weights = jnp.ones(flat.shape[:1]) if weights is None else weights.reshape(-1).astype(jnp.float32)
    block_size = block_size or streaming.default_block_size(flat.shape[0])
    keys = streaming.Table(keys)
    moments = _moments(flat, keys, statistics, eps, block_size)

    def find_normalizer(start, size, running):
        return running.update(_scores(flat, keys, scale, bias, moments, start, size)[0])[0]

    fold = functools.partial(streaming.stream, num_rows=keys.num_rows, block_size=block_size)
    softmax = fold(find_normalizer, streaming.RunningSoftmax.empty(flat.shape[0]))

    def count(start, size, usage):
        scores, _ = _scores(flat, keys, scale, bias, moments, start, size)
        return streaming.update_block(usage, start, weights @ softmax.probabilities(scores))

    return fold(count, jnp.zeros(keys.num_rows))


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static."""

    eps: float
    entropy: bool
    top_k: int
    block_size: int | None
    axes: streaming.VocabularyMesh


@flax.struct.dataclass
class _Moments:
    """Of the logits of each query, float32.

    Attributes:
      mean_row: w̄.
      mean: mu.
      rate: r = 1 / sqrt(variance + eps).
      spread: C q, where C was at hand.
    """

    mean_row: Float[Array, " D"]
    mean: Float[Array, " T"]
    rate: Float[Array, " T"]
    spread: Float[Array, "T D"] | None = None


@flax.struct.dataclass
class _Saved:
    """What the forward pass leaves to the backward pass, float32.

    Attributes:
      moments: of the logits.
      softmax: largest score and sum of exp(score - largest).
      mixed: o.
      tilted: h and sum_v p_tv scale_v z_tv, both less the largest score's share; only where C is not at hand.
    """

    moments: _Moments
    softmax: streaming.RunningSoftmax
    mixed: Float[Array, "T Dv"]
    tilted: tuple[Float[Array, "T Dv"], Float[Array, " T"]] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, keys, scale, bias, values, statistics):
    return _forward(options, False, q, keys, scale, bias, values, statistics)[:2]


def _attend_forward(options, q, keys, scale, bias, values, statistics):
    mixed, summary, saved = _forward(options, True, q, keys, scale, bias, values, statistics)
    return (mixed, summary), (q, keys, scale, bias, values, statistics, saved)


def _attend_backward(options, inputs, cotangents):
    mixed, _ = cotangents
    return (*_backward(options, *inputs, mixed), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(options, for_gradient, q, keys, scale, bias, values, statistics):
    """Result, summary and (`for_gradient`) what is to be saved, from all devices."""
    axes = options.axes
    of_query, of_row, of_table = streaming.query_spec(axes), streaming.row_spec(axes), streaming.table_spec(axes)

    def local(q, keys, scale, bias, values, statistics):
        flat, keys, values = q.reshape(-1, q.shape[-1]), streaming.Table(keys, axes), streaming.Table(values, axes)
        mixed, summary, saved = _forward_rows(options, for_gradient, flat, keys, scale, bias, values, statistics)

        def unflatten(leaf):
            return leaf.reshape(*q.shape[:-1], *leaf.shape[1:])

        return unflatten(mixed), jax.tree.map(unflatten, summary), saved

    saved_spec = None
    if for_gradient:
        with_spread = statistics is not None or _uses_covariance(options, q)
        moments = _Moments(jax.P(), of_query, of_query, of_query if with_spread else None)
        saved_spec = _Saved(moments, of_query, of_query, None if with_spread else (of_query, of_query))
    summary_spec = VocabularySummary(
        of_query if options.entropy else None,
        *((of_query, of_query) if options.top_k else ()),
    )
    in_specs = (of_query, of_table, of_row, of_row, of_table, jax.P())
    sharded = streaming.shard(local, axes, in_specs, (of_query, summary_spec, saved_spec))
    return sharded(q, keys, scale, bias, values, statistics)


def _forward_rows(options, for_gradient, q, keys, scale, bias, values, statistics):
    """The forward pass over this device's rows of the tables for its queries [T, D], merged with the other devices'."""
    across = options.axes.vocabulary
    num_queries = q.shape[0]
    # Accelerators compute in bfloat16. A CPU does in float32, and larger blocks no longer fit its caches.
    larger = not for_gradient and q.dtype != jnp.float32
    block_size = options.block_size or streaming.default_block_size(num_queries, inference=larger)
    moments = _moments(q, keys, statistics, options.eps, block_size)
    tilt = for_gradient and moments.spread is None
    # The rounded weights of a mixture are divided by their own sum: they then add up to 1, and a large mean of the
    # values, which the gradient's differences of mixtures must not see, is exact.
    rounds = q.dtype != jnp.float32

    def step(start, size, carry):
        previous, sums, top = carry
        scores, _ = _scores(q, keys, scale, bias, moments, start, size)
        block = values.read_block(start, size, q.dtype)
        running, weights, decay = previous.update(scores)
        # What is weighted by the distance to the largest score grows when that rises.
        risen = (previous.maximum - running.maximum)[:, None]
        distance = scores - running.maximum[:, None]
        rounded = weights.astype(q.dtype)
        new = {"mixed": decay * sums["mixed"] + streaming.dot(rounded, block)}
        if rounds:
            new["share"] = decay * sums["share"] + _row_sum(rounded)
        if tilt:
            tilted = (weights * (distance - streaming.slice_block(bias, start, size))).astype(q.dtype)
            new["tilted"] = decay * (sums["tilted"] + risen * sums["mixed"]) + streaming.dot(tilted, block)
            new["tilt"] = decay * (sums["tilt"] + risen * previous.total[:, None]) + _row_sum(tilted)
        if options.entropy:
            new["distance"] = decay * (sums["distance"] + risen * previous.total[:, None])
            new["distance"] += _row_sum(weights * distance)
        if options.top_k:
            top = _merge_top(options.top_k, top, scores, start + jnp.arange(size))
        return running, new, top

    # The width of each sum: mixtures of values, and scalars.
    widths = {"mixed": values.width}
    if rounds:
        widths |= {"share": 1}
    if tilt:
        widths |= {"tilted": values.width, "tilt": 1}
    if options.entropy:
        widths |= {"distance": 1}
    sums = {name: jnp.zeros((num_queries, width)) for name, width in widths.items()}
    no_words = jnp.full((num_queries, options.top_k), streaming.LOWEST), jnp.zeros((num_queries, options.top_k), int)
    start = (streaming.RunningSoftmax.empty(num_queries), sums, no_words)
    local, sums, top = streaming.stream(step, start, num_rows=keys.num_rows, block_size=block_size)

    maximum = local.shared_maximum(across)
    risen, total = (local.maximum - maximum)[:, None], local.total[:, None]
    for name, weight in (("tilted", sums["mixed"]), ("tilt", total), ("distance", total)):
        if name in sums:
            sums[name] += risen * weight
    running, merged = local.merge(maximum, sums, {}, across)
    means = {name: total / running.total[:, None] for name, total in merged.items()}
    if rounds:
        means["mixed"] = merged["mixed"] / merged["share"]

    summary = VocabularySummary()
    if options.entropy:
        summary = summary.replace(entropy=jnp.log(running.total) - means["distance"][:, 0])
    if options.top_k:
        scores, ids = _share_top(options.top_k, top, keys.num_rows, across)
        summary = summary.replace(top_probabilities=running.probabilities(scores), top_ids=ids)
    saved = None
    if for_gradient:
        saved = _Saved(moments, running, means["mixed"], (means["tilted"], means["tilt"][:, 0]) if tilt else None)
    return means["mixed"].astype(q.dtype), summary, saved


def _backward(options, q, keys, scale, bias, values, statistics, saved, cotangent):
    """The five gradients, from all devices."""
    axes = options.axes
    of_query, of_row, of_table = streaming.query_spec(axes), streaming.row_spec(axes), streaming.table_spec(axes)

    def local(q, keys, scale, bias, values, saved, cotangent):
        flat, cotangent = q.reshape(-1, q.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
        keys, values = streaming.Table(keys, axes), streaming.Table(values, axes)
        frozen = statistics is not None
        of_q, *rest = _backward_rows(options, frozen, flat, keys, scale, bias, values, saved, cotangent)
        return of_q.reshape(q.shape), *rest

    saved_spec = jax.tree.map(lambda _: of_query, saved)
    saved_spec = saved_spec.replace(moments=saved_spec.moments.replace(mean_row=jax.P()))
    in_specs = (of_query, of_table, of_row, of_row, of_table, saved_spec, of_query)
    sharded = streaming.shard(local, axes, in_specs, (of_query, of_table, of_row, of_row, of_table))
    return sharded(q, keys, scale, bias, values, saved, cotangent)


def _backward_rows(options, frozen, q, keys, scale, bias, values, saved, cotangent):
    """Gradients of this device's queries from all rows, and of its part of the tables from all queries."""
    axes, moments = options.axes, saved.moments
    block_size = options.block_size or streaming.default_block_size(q.shape[0])
    rows = keys.num_global_rows
    rate = moments.rate[:, None]
    # sum_v p_tv dL/dp_tv, which the softmax subtracts from each dL/dp_tv.
    expected = jnp.sum(cotangent.astype(jnp.float32) * saved.mixed, axis=-1)
    second = None
    if saved.tilted is not None:
        tilted, tilt = saved.tilted
        second = jnp.sum(cotangent.astype(jnp.float32) * tilted, axis=-1) - expected * tilt

    def step(start, size, carry):
        of_q, of_keys, of_scale, of_bias, of_values, sums = carry
        key_block = keys.read_block(start, size, q.dtype)
        value_block = values.read_block(start, size, q.dtype)
        scores, normed = _scores(q, keys, scale, bias, moments, start, size)
        p = saved.softmax.probabilities(scores)
        of_scores = p * (streaming.dot(cotangent, value_block.T) - expected[:, None])
        of_normed = of_scores * streaming.slice_block(scale, start, size)
        sums = dict(sums)
        if second is None:
            sums["second"] += jnp.sum(of_normed * normed, axis=-1)
        else:
            of_normed -= (second / rows)[:, None] * normed
        # Rounded first and summed then: so the gradient of q does not depend on the mean row, which may be large.
        of_logits = (of_normed * rate).astype(q.dtype)
        sums["first"] += jnp.sum(of_logits, axis=-1, dtype=jnp.float32)
        return (
            of_q + streaming.dot(of_logits, key_block),
            keys.update_gradient(of_keys, start, streaming.dot(of_logits.T, q)),
            streaming.update_block(of_scale, start, jnp.sum(of_scores * normed, axis=0)),
            streaming.update_block(of_bias, start, jnp.sum(of_scores, axis=0)),
            values.update_gradient(of_values, start, streaming.dot(p.astype(q.dtype).T, cotangent)),
            sums,
        )

    # The gradient of the keys is corrected once more below, and rounded to their dtype only then.
    of_keys = jnp.zeros(keys.part.shape, keys.part.dtype if frozen else jnp.float32)
    zeros = (of_keys, *map(jnp.zeros_like, (scale, bias, values.part)))
    sums = {name: jnp.zeros(q.shape[:1]) for name in (("first",) if second is not None else ("first", "second"))}
    carry = (jnp.zeros(q.shape), *zeros, sums)
    fold = functools.partial(streaming.stream, num_rows=keys.num_rows, block_size=block_size)
    of_q, of_keys, of_scale, of_bias, of_values, sums = fold(step, carry)
    sums = {name: total[:, None] for name, total in sums.items()}
    sums = streaming.all_reduce_columns({"of_q": of_q, **sums}, axes.vocabulary)
    of_keys, of_values = (streaming.all_reduce(gradient, axes.queries_only) for gradient in (of_keys, of_values))
    # The two short ones share an all-reduce.
    norm = streaming.all_reduce_columns({"scale": of_scale[:, None], "bias": of_bias[:, None]}, axes.queries)

    of_q, first = sums["of_q"], sums["first"]
    of_q -= first * moments.mean_row
    if second is None:
        second = sums["second"] * rate**2
        of_q -= second * moments.spread
    if not frozen:
        # The share of the mean and, with the covariance, of the variance: see the module's docstring.
        shift = jnp.sum(first / rows * q, axis=0, keepdims=True)
        if moments.spread is None:
            of_keys -= keys.local_columns(streaming.all_reduce(shift, axes.queries)[0])
        else:
            matrix = streaming.dot((second / rows * q).astype(q.dtype).T, q)
            both = streaming.all_reduce(jnp.concatenate([shift, matrix]), axes.queries)
            shift, matrix = both[0], both[1:].astype(q.dtype)
            share, num_real = keys.to_row_shards(q.dtype)

            def correct(start, size, corrected):
                centred = centered_rows(share, num_real, moments.mean_row, start, size, q.dtype)
                correction = shift + streaming.dot(centred, matrix)
                return streaming.update_block(
                    corrected, start, streaming.slice_block(corrected, start, size) - correction
                )

            # Without shares the gradient is corrected in place.
            corrected = jnp.zeros((share.num_rows, keys.width)) if axes.widths else of_keys
            corrected = streaming.stream(correct, corrected, num_rows=share.num_rows, block_size=block_size)
            of_keys = of_keys + keys.from_row_shards(corrected) if axes.widths else corrected
    return of_q.astype(q.dtype), of_keys.astype(keys.part.dtype), norm["scale"][:, 0], norm["bias"][:, 0], of_values


def _uses_covariance(options, q) -> bool:
    """Of the queries [..., D] of all devices."""
    mesh = jax.sharding.get_abstract_mesh().shape
    cut, num_parts = (math.prod(mesh[axis] for axis in axes) for axes in (options.axes.queries, options.axes.widths))
    return covariance_is_cheaper(q.size // q.shape[-1] // cut, q.shape[-1], num_parts)


def _moments(q, keys: streaming.Table, statistics, eps, block_size) -> _Moments:
    """Mean and variance of the logits of queries [T, D], by whatever is cheapest."""
    if statistics is None:
        mean_of_rows = mean_row(keys, q.dtype)
        if not covariance_is_cheaper(*q.shape, keys.num_width_shards):
            mean = q.astype(jnp.float32) @ mean_of_rows
            variance = streamed_variance(q, keys, mean, block_size)
            return _Moments(mean_of_rows, mean, jax.lax.rsqrt(variance + eps))
        covariance = centered_covariance(keys, mean_of_rows, q.dtype, block_size)
        statistics = VocabularyStatistics(mean_of_rows, covariance)
    mean, variance, spread = statistics.moments(q)
    return _Moments(statistics.mean, mean, jax.lax.rsqrt(variance + eps), spread)


def _scores(q, keys, scale, bias, moments, start, size) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    """s and z of a block."""
    logits = streaming.dot(q, keys.read_block(start, size, q.dtype).T)
    normed = (logits - moments.mean[:, None]) * moments.rate[:, None]
    return normed * streaming.slice_block(scale, start, size) + streaming.slice_block(bias, start, size), normed


def _row_sum(block: Float[Array, "T K"]) -> Float[Array, "T 1"]:
    return jnp.sum(block, axis=-1, keepdims=True, dtype=jnp.float32)


def _merge_top(k, top, scores, ids):
    """The k largest of those so far and of a block's, with their words."""
    scores, places = jax.lax.top_k(scores, min(k, scores.shape[1]))
    scores = jnp.concatenate([top[0], scores], axis=1)
    ids = jnp.concatenate([top[1], jnp.take(ids, places)], axis=1)
    scores, places = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, places, axis=1)


def _share_top(k, top, num_local_rows, across):
    """The k largest of all devices'."""
    if not across:
        return top
    scores, ids = top
    ids += jax.lax.axis_index(across) * num_local_rows
    scores, ids = (jax.lax.all_gather(leaf, across, axis=1, tiled=True) for leaf in (scores, ids))
    scores, places = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, places, axis=1)
