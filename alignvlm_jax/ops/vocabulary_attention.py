"""ALIGN as attention over the vocabulary: queries, keys and values, with a LayerNorm between scores and softmax.

    logits   l_tv = q_t·w_v                      w: rows of the keys
    LayerNorm    z_tv = r_t (l_tv - mu_t)        mu, 1/r² - eps: mean and variance over v
    scores   s_tv = scale_v z_tv + bias_v
    P        p_tv = exp(s_tv) / sum_v exp(s_tv)
    result   o_t  = sum_v p_tv e_v               e: rows of the values

Axes: T queries, D width, V vocabulary, Dv value width, K rows of the vocabulary in a block, k largest probabilities.

`dense_align.py` holds the dense form, as the paper writes it; the tests compare with it.

P is never held: the forward and the backward pass process the vocabulary one block at a time
(`vocabulary_streaming.py`). mu and r come from `vocabulary_statistics.py`. With d_tv = scale_v dL/ds_tv,
a1_t = sum_v d_tv and a2_t = sum_v d_tv z_tv, the gradients through the LayerNorm are

    dL/dq_t = r_t (sum_v d_tv w_v - a1_t w̄ - a2_t r_t C q_t)
    dL/dw_v = sum_t r_t (d_tv - a1_t/V - a2_t/V z_tv) q_t
            = sum_t r_t d_tv q_t  -  sum_t r_t a1_t/V q_t  -  (sum_t r_t² a2_t/V q_t q_tᵀ) (w_v - w̄)

docs/vocabulary.md derives them. a1 and a2 are sums over the whole vocabulary, which are known only after the pass:

- with the covariance C, the terms that contain them are added after the pass, as products with D x D matrices;
- without C (few queries), a2 must be known before the pass. The forward pass therefore also sums
  h_t = sum_v p_tv scale_v z_tv e_v, and then a2_t = dL/do_t·h_t - (dL/do_t·o_t) sum_v p_tv scale_v z_tv.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
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
    """Properties of P that were requested besides the result. No gradient flows through them.

    Attributes:
      entropy: entropy of each query's P, in nats; None if not requested.
      top_probabilities: the k largest probabilities of each query, largest first; None if not requested.
      top_ids: the words with these probabilities; None if not requested.
    """

    entropy: Float[Array, "..."] | None = None
    top_probabilities: Float[Array, "... k"] | None = None
    top_ids: Int[Array, "... k"] | None = None


@ordinary_modes()
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
    """Computes `softmax(LayerNorm(q @ keys.T) * scale + bias) @ values` in memory that does not grow with T x V.

    Args:
      q: queries of any leading shape; products are computed in their dtype, sums and statistics in float32.
      keys: a row for each word, cast to the dtype of `q` one block at a time.
      scale: scale of the LayerNorm.
      bias: bias of the LayerNorm.
      values: a row for each word, cast like the keys.
      eps: epsilon of the LayerNorm.
      statistics: result of `vocabulary_statistics` for frozen keys, to avoid computing it in every call. No gradient of
        the keys flows through it. It may belong to a larger table, of which `keys` has only some rows.
      entropy: whether to return the entropy of P.
      top_k: number of largest probabilities to return.
      block_size: K; None means `default_block_size`.
      mesh_axes: axes of the current mesh that split the first axis of `q`, the vocabulary, and the width of the tables.

    Returns:
      The result in the dtype of `q`. If entropy or probabilities were requested, a pair of the result and a
      `VocabularySummary`.
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
    # A single query [D] becomes a batch of one.
    queries = q if q.ndim > 1 else q[None]
    mixed, summary = _attend(options, _Inputs(queries, keys, scale, bias, values), statistics)
    if q.ndim == 1:
        mixed, summary = mixed[0], jax.tree.map(lambda leaf: leaf[0], summary)
    return (mixed, summary) if entropy or top_k else mixed


@ordinary_modes()
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
    """Returns the usage of each word, the sum over queries of weight * P, in float32.

    This needs one pass over the vocabulary more than `vocabulary_attention`.

    Args:
      q: queries of any leading shape.
      keys: a row for each word, cast to the dtype of `q` one block at a time.
      scale: scale of the LayerNorm.
      bias: bias of the LayerNorm.
      eps: epsilon of the LayerNorm.
      statistics: result of `vocabulary_statistics` for frozen keys.
      weights: weights of the queries; None means 1.
      block_size: K; None means `default_block_size`.
    """
    flat = q.reshape(-1, q.shape[-1])
    weights = jnp.ones(flat.shape[:1]) if weights is None else weights.reshape(-1).astype(jnp.float32)
    block_size = block_size or streaming.default_block_size(flat.shape[0])
    keys = streaming.Table(keys)
    moments = _moments(flat, keys, statistics, eps=eps, block_size=block_size)
    scorer = _Scorer(flat, keys, scale, bias, moments)
    fold = functools.partial(streaming.stream, num_rows=keys.num_rows, block_size=block_size)

    # The first pass computes the normalizer of the softmax, the second one sums the probabilities.
    def update_softmax(start, size, running):
        return running.update(scorer.block(start, size)[0])[0]

    softmax = fold(update_softmax, streaming.RunningSoftmax.empty(flat.shape[0]))

    def update_usage(start, size, usage):
        scores, _ = scorer.block(start, size)
        return streaming.update_block(usage, start, weights @ softmax.probabilities(scores))

    return fold(update_usage, jnp.zeros(keys.num_rows))


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static (hashable) options of the custom-VJP functions."""

    eps: float
    entropy: bool
    top_k: int
    block_size: int | None
    axes: streaming.VocabularyMesh


@flax.struct.dataclass
class _Inputs:
    """Differentiable inputs. The same tree also holds their PartitionSpecs, their tables and their gradients.

    Attributes:
      q: queries [..., D].
      keys: [V, D].
      scale: [V].
      bias: [V].
      values: [V, Dv].
    """

    q: Any
    keys: Any
    scale: Any
    bias: Any
    values: Any


@flax.struct.dataclass
class _Moments:
    """Moments of the logits of each query, in float32.

    Attributes:
      mean_row: w̄.
      mean: mu.
      rate: r = 1 / sqrt(variance + eps).
      spread: C q; None if C was not computed.
    """

    mean_row: Float[Array, " D"]
    mean: Float[Array, " T"]
    rate: Float[Array, " T"]
    spread: Float[Array, "T D"] | None = None


@flax.struct.dataclass
class _Residuals:
    """Results of the forward pass that the backward pass needs, in float32.

    Attributes:
      moments: moments of the logits.
      softmax: largest score m, and sum of exp(score - m).
      mixed: o.
      tilted: h - m o and sum_v p_tv scale_v z_tv - m; None if C was computed.
    """

    moments: _Moments
    softmax: streaming.RunningSoftmax
    mixed: Float[Array, "T Dv"]
    tilted: tuple[Float[Array, "T Dv"], Float[Array, " T"]] | None


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Computes the scores of this device's queries [T, D], one block of words at a time."""

    q: Float[Array, "T D"]
    keys: streaming.Table
    scale: Float[Array, " V"]
    bias: Float[Array, " V"]
    moments: _Moments

    def block(self, start: Array | int, size: int) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
        """Returns the scores s and the normalized logits z of a block of words."""
        logits = streaming.dot(self.q, self.keys.read_block(start, size, self.q.dtype).T)
        normed = (logits - self.moments.mean[:, None]) * self.moments.rate[:, None]
        scale = streaming.slice_block(self.scale, start, size)
        return normed * scale + streaming.slice_block(self.bias, start, size), normed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, inputs, statistics):
    return _forward(options, inputs, statistics, for_gradient=False)[:2]


@ordinary_modes()
def _attend_forward(options, inputs, statistics):
    mixed, summary, residuals = _forward(options, inputs, statistics, for_gradient=True)
    return (mixed, summary), (inputs, statistics, residuals)


@ordinary_modes()
def _attend_backward(options, saved, cotangents):
    inputs, statistics, residuals = saved
    cotangent, _ = cotangents  # the summary counts as constant, so its cotangent is ignored
    return _backward(options, inputs, residuals, cotangent, frozen=statistics is not None), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    options: _Options, inputs: _Inputs, statistics: VocabularyStatistics | None, *, for_gradient: bool
) -> tuple[Float[Array, "... Dv"], VocabularySummary, _Residuals | None]:
    """Runs the forward pass on all devices.

    Args:
      options: static options.
      inputs: queries and tables.
      statistics: statistics of frozen keys, or None.
      for_gradient: whether a backward pass follows.

    Returns:
      The result, the summary, and the residuals (None without gradient).
    """
    axes = options.axes
    query_spec = streaming.query_spec(axes)

    def local(inputs, statistics):
        mixed, summary, residuals = _local_forward(
            options, _local_inputs(inputs, axes), statistics, for_gradient=for_gradient
        )

        def unflatten(leaf):
            # From [T, ...] to the leading axes of the queries.
            return leaf.reshape(*inputs.q.shape[:-1], *leaf.shape[1:])

        return unflatten(mixed), jax.tree.map(unflatten, summary), residuals

    # Specs of the results. Residuals keep the flat queries [T, ...].
    residuals_spec = None
    if for_gradient:
        has_spread = statistics is not None or _uses_covariance(options, inputs.q)
        moments_spec = _Moments(jax.P(), query_spec, query_spec, query_spec if has_spread else None)
        tilted_spec = None if has_spread else (query_spec, query_spec)
        residuals_spec = _Residuals(moments_spec, query_spec, query_spec, tilted_spec)
    summary_spec = VocabularySummary(
        query_spec if options.entropy else None,
        *((query_spec, query_spec) if options.top_k else ()),
    )
    in_specs = (_input_specs(axes), jax.P())
    return streaming.shard(local, axes, in_specs, (query_spec, summary_spec, residuals_spec))(inputs, statistics)


def _input_specs(axes: streaming.VocabularyMesh) -> _Inputs:
    """Returns the PartitionSpecs of the inputs. Their gradients have the same specs."""
    row_spec, table_spec = streaming.row_spec(axes), streaming.table_spec(axes)
    return _Inputs(q=streaming.query_spec(axes), keys=table_spec, scale=row_spec, bias=row_spec, values=table_spec)


def _local_inputs(inputs: _Inputs, axes: streaming.VocabularyMesh) -> _Inputs:
    """Returns the inputs of one device with flat queries [T, D], and keys and values as `Table`s."""
    return inputs.replace(
        q=inputs.q.reshape(-1, inputs.q.shape[-1]),
        keys=streaming.Table(inputs.keys, axes),
        values=streaming.Table(inputs.values, axes),
    )


def _local_forward(
    options: _Options, inputs: _Inputs, statistics: VocabularyStatistics | None, *, for_gradient: bool
) -> tuple[Float[Array, "T Dv"], VocabularySummary, _Residuals | None]:
    """Passes over this device's rows of the tables for its queries, and merges the sums over devices."""
    axis_names = options.axes.vocabulary
    q, keys, values = inputs.q, inputs.keys, inputs.values
    num_queries = q.shape[0]
    # float32 means a CPU here, whose caches larger blocks would not fit into. Accelerators compute in bfloat16.
    use_larger_blocks = not for_gradient and q.dtype != jnp.float32
    block_size = options.block_size or streaming.default_block_size(num_queries, inference=use_larger_blocks)
    moments = _moments(q, keys, statistics, eps=options.eps, block_size=block_size)
    scorer = _Scorer(q, keys, inputs.scale, inputs.bias, moments)
    # If C is not known, the backward pass needs a2 in advance, and a2 needs a second mixture h.
    needs_tilted = for_gradient and moments.spread is None
    # Weights that are rounded to bfloat16 are divided by their own sum, so that they add up to 1. Otherwise a
    # large mean of the values would leave an error in the gradient's differences of mixtures.
    rounds_weights = q.dtype != jnp.float32

    def step(start, size, carry):
        previous, sums, top = carry
        scores, _ = scorer.block(start, size)
        block = values.read_block(start, size, q.dtype)
        running, weights, decay = previous.update(scores)
        # Sums that contain the distance to the largest score must be shifted when that score rises.
        shift = (previous.maximum - running.maximum)[:, None]
        distance = scores - running.maximum[:, None]
        rounded = weights.astype(q.dtype)
        new = {"mixed": decay * sums["mixed"] + streaming.dot(rounded, block)}
        if rounds_weights:
            new["rounded_total"] = decay * sums["rounded_total"] + _row_sum(rounded)
        if needs_tilted:
            # The distance minus the bias is scale z - m. Relative to m, no large numbers cancel.
            tilted = (weights * (distance - streaming.slice_block(inputs.bias, start, size))).astype(q.dtype)
            new["tilted_mixed"] = decay * (sums["tilted_mixed"] + shift * sums["mixed"]) + streaming.dot(tilted, block)
            new["tilted_total"] = decay * (sums["tilted_total"] + shift * previous.total[:, None]) + _row_sum(tilted)
        if options.entropy:
            # The entropy is log(total) - sum_v p_tv (s_tv - m).
            new["distance"] = decay * (sums["distance"] + shift * previous.total[:, None])
            new["distance"] += _row_sum(weights * distance)
        if options.top_k:
            top = _merge_top(options.top_k, top, scores, start + jnp.arange(size))
        return running, new, top

    # Each sum is a mixture of values [T, Dv] or a scalar per query [T, 1].
    widths = {"mixed": values.width}
    if rounds_weights:
        widths |= {"rounded_total": 1}
    if needs_tilted:
        widths |= {"tilted_mixed": values.width, "tilted_total": 1}
    if options.entropy:
        widths |= {"distance": 1}
    sums = {name: jnp.zeros((num_queries, width)) for name, width in widths.items()}
    no_words = jnp.full((num_queries, options.top_k), streaming.LOWEST), jnp.zeros((num_queries, options.top_k), int)
    start = (streaming.RunningSoftmax.empty(num_queries), sums, no_words)
    local, sums, top = streaming.stream(step, start, num_rows=keys.num_rows, block_size=block_size)

    # Softmax over the local rows, then merge across devices. The distances are shifted to the shared maximum first.
    maximum = local.shared_maximum(axis_names)
    shift, total = (local.maximum - maximum)[:, None], local.total[:, None]
    for name, weight in (("tilted_mixed", sums["mixed"]), ("tilted_total", total), ("distance", total)):
        if name in sums:
            sums[name] += shift * weight
    softmax, merged = local.merge(maximum, sums, {}, axis_names)
    # Divide by the normalizer: sums of exp(s - m) x become expectations of x under P.
    means = {name: total / softmax.total[:, None] for name, total in merged.items()}
    if rounds_weights:
        means["mixed"] = merged["mixed"] / merged["rounded_total"]

    summary = VocabularySummary()
    if options.entropy:
        summary = summary.replace(entropy=jnp.log(softmax.total) - means["distance"][:, 0])
    if options.top_k:
        scores, ids = _all_gather_top(options.top_k, top, keys.num_rows, axis_names)
        summary = summary.replace(top_probabilities=softmax.probabilities(scores), top_ids=ids)
    residuals = None
    if for_gradient:
        tilted = (means["tilted_mixed"], means["tilted_total"][:, 0]) if needs_tilted else None
        residuals = _Residuals(moments, softmax, means["mixed"], tilted)
    return means["mixed"].astype(q.dtype), summary, residuals


def _backward(
    options: _Options, inputs: _Inputs, residuals: _Residuals, cotangent: Float[Array, "... Dv"], *, frozen: bool
) -> _Inputs:
    """Runs the backward pass on all devices.

    Args:
      options: static options.
      inputs: queries and tables.
      residuals: residuals of the forward pass.
      cotangent: dL/do.
      frozen: whether the statistics of the keys were given, and are constant.

    Returns:
      The gradients of the inputs.
    """
    axes = options.axes
    query_spec = streaming.query_spec(axes)

    def local(inputs, residuals, cotangent):
        flat_cotangent = cotangent.reshape(-1, cotangent.shape[-1])
        gradients = _local_backward(options, _local_inputs(inputs, axes), residuals, flat_cotangent, frozen=frozen)
        return gradients.replace(q=gradients.q.reshape(inputs.q.shape))

    # All residuals are split like the queries, except for the mean row.
    residuals_spec = jax.tree.map(lambda _: query_spec, residuals)
    residuals_spec = residuals_spec.replace(moments=residuals_spec.moments.replace(mean_row=jax.P()))
    specs = _input_specs(axes)
    return streaming.shard(local, axes, (specs, residuals_spec, query_spec), specs)(inputs, residuals, cotangent)


def _local_backward(
    options: _Options, inputs: _Inputs, residuals: _Residuals, cotangent: Float[Array, "T Dv"], *, frozen: bool
) -> _Inputs:
    """Returns the gradients of this device's queries from all rows, and of its part of the tables from all queries."""
    axes, moments = options.axes, residuals.moments
    q, keys, values = inputs.q, inputs.keys, inputs.values
    block_size = options.block_size or streaming.default_block_size(q.shape[0])
    num_words = keys.num_global_rows
    rate = moments.rate[:, None]
    scorer = _Scorer(q, keys, inputs.scale, inputs.bias, moments)
    # sum_v p_tv dL/dp_tv, which the softmax subtracts from each dL/dp_tv.
    expected = jnp.sum(cotangent.astype(jnp.float32) * residuals.mixed, axis=-1)
    # a2, if it is known before the pass. Both tilted values are relative to m, which cancels here.
    known_a2 = None
    if residuals.tilted is not None:
        tilted_mixed, tilted_total = residuals.tilted
        known_a2 = jnp.sum(cotangent.astype(jnp.float32) * tilted_mixed, axis=-1) - expected * tilted_total

    def step(start, size, carry):
        gradients, sums = carry
        key_block = keys.read_block(start, size, q.dtype)
        value_block = values.read_block(start, size, q.dtype)
        # Recompute P of the block, then go back through softmax, scale and LayerNorm.
        scores, normed = scorer.block(start, size)
        p = residuals.softmax.probabilities(scores)
        dscores = p * (streaming.dot(cotangent, value_block.T) - expected[:, None])
        dnormed = dscores * streaming.slice_block(inputs.scale, start, size)
        sums = dict(sums)
        if known_a2 is None:
            sums["a2"] += jnp.sum(dnormed * normed, axis=-1)
        else:
            dnormed -= (known_a2 / num_words)[:, None] * normed
        # a1 sums the rounded values, as the product below does: the mean row, which may be large, then cancels
        # in the gradient of q.
        dlogits = (dnormed * rate).astype(q.dtype)
        sums["scaled_a1"] += jnp.sum(dlogits, axis=-1, dtype=jnp.float32)
        gradients = _Inputs(
            q=gradients.q + streaming.dot(dlogits, key_block),
            keys=keys.update_gradient(gradients.keys, start, streaming.dot(dlogits.T, q)),
            scale=streaming.update_block(gradients.scale, start, jnp.sum(dscores * normed, axis=0)),
            bias=streaming.update_block(gradients.bias, start, jnp.sum(dscores, axis=0)),
            values=values.update_gradient(gradients.values, start, streaming.dot(p.astype(q.dtype).T, cotangent)),
        )
        return gradients, sums

    gradients = _Inputs(
        q=jnp.zeros(q.shape),
        # Unless the keys are frozen, their gradient is corrected below, and only then rounded to their dtype.
        keys=jnp.zeros(keys.part.shape, keys.part.dtype if frozen else jnp.float32),
        scale=jnp.zeros_like(inputs.scale),
        bias=jnp.zeros_like(inputs.bias),
        values=jnp.zeros_like(values.part),
    )
    # "scaled_a1" is the sum of dlogits, r a1.
    names = ("scaled_a1",) if known_a2 is not None else ("scaled_a1", "a2")
    sums = {name: jnp.zeros(q.shape[:1]) for name in names}
    gradients, sums = streaming.stream(step, (gradients, sums), num_rows=keys.num_rows, block_size=block_size)

    # Sum over devices: gradients of queries over the axes of the vocabulary, gradients of tables over those of the
    # queries. Scale and bias share an all-reduce.
    sums = {name: total[:, None] for name, total in sums.items()}
    sums = streaming.all_reduce_columns({"dq": gradients.q, **sums}, axes.vocabulary)
    dkeys, dvalues = (
        streaming.all_reduce_gradient(gradient, axes.queries_only) for gradient in (gradients.keys, gradients.values)
    )
    norm = streaming.all_reduce_columns(
        {"scale": gradients.scale[:, None], "bias": gradients.bias[:, None]}, axes.queries
    )

    # Add the terms with a1 and a2, which are known only now (see the module's docstring).
    dq, scaled_a1 = sums["dq"], sums["scaled_a1"]
    dq -= scaled_a1 * moments.mean_row
    scaled_a2 = None
    if known_a2 is None:
        scaled_a2 = sums["a2"] * rate**2
        dq -= scaled_a2 * moments.spread
    if not frozen:
        dkeys = _add_statistics_gradient(
            dkeys, keys, q, moments, scaled_a1=scaled_a1, scaled_a2=scaled_a2, block_size=block_size
        )
    return _Inputs(
        q=dq.astype(q.dtype),
        keys=dkeys.astype(keys.part.dtype),
        scale=norm["scale"][:, 0],
        bias=norm["bias"][:, 0],
        values=dvalues,
    )


def _add_statistics_gradient(
    dkeys: Float[Array, "V/t D/f"],
    keys: streaming.Table,
    q: Float[Array, "T D"],
    moments: _Moments,
    *,
    scaled_a1: Float[Array, "T 1"],
    scaled_a2: Float[Array, "T 1"] | None,
    block_size: int,
) -> Float[Array, "V/t D/f"]:
    """Adds the parts of the gradient of the keys that flow through the mean and the variance of the logits.

    These are the second and the third term of dL/dw in the module's docstring.

    Args:
      dkeys: gradient of the keys, the first term.
      keys: the keys.
      q: queries of this device.
      moments: moments of the logits.
      scaled_a1: r a1.
      scaled_a2: r² a2; None without covariance, in which case `dkeys` contains the third term already.
      block_size: K.
    """
    axes, num_words = keys.axes, keys.num_global_rows
    mean_term = jnp.sum(scaled_a1 / num_words * q, axis=0, keepdims=True)
    if scaled_a2 is None:
        return dkeys - keys.local_columns(streaming.all_reduce(mean_term, axes.queries)[0])
    matrix = streaming.dot((scaled_a2 / num_words * q).astype(q.dtype).T, q)
    # One all-reduce for both terms.
    both = streaming.all_reduce(jnp.concatenate([mean_term, matrix]), axes.queries)
    mean_term, matrix = both[0], both[1:].astype(q.dtype)
    # Devices that share the columns of the keys divide the rows among themselves.
    row_shard, num_real = keys.to_row_shards(q.dtype)

    def correct(start, size, corrected):
        centered = centered_rows(row_shard, num_real, moments.mean_row, start, size, q.dtype)
        correction = mean_term + streaming.dot(centered, matrix)
        return streaming.update_block(corrected, start, streaming.slice_block(corrected, start, size) - correction)

    # Without row shards, the gradient is corrected in place. With them, the correction is computed separately and then
    # redistributed to the columns.
    corrected = jnp.zeros((row_shard.num_rows, keys.width)) if axes.widths else dkeys
    corrected = streaming.stream(correct, corrected, num_rows=row_shard.num_rows, block_size=block_size)
    return dkeys + keys.from_row_shards(corrected) if axes.widths else corrected


def _uses_covariance(options: _Options, q: Float[Array, "... D"]) -> bool:
    """Returns whether the forward pass will compute the covariance, given the queries of all devices."""
    mesh = jax.sharding.get_abstract_mesh().shape
    num_query_shards = math.prod(mesh[axis] for axis in options.axes.queries)
    num_width_shards = math.prod(mesh[axis] for axis in options.axes.widths)
    return covariance_is_cheaper(q.size // q.shape[-1] // num_query_shards, q.shape[-1], num_width_shards)


def _moments(
    q: Float[Array, "T D"],
    keys: streaming.Table,
    statistics: VocabularyStatistics | None,
    *,
    eps: float,
    block_size: int,
) -> _Moments:
    """Returns the moments of the logits, computed in the cheaper of the two ways."""
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


def _row_sum(block: Float[Array, "T K"]) -> Float[Array, "T 1"]:
    return jnp.sum(block, axis=-1, keepdims=True, dtype=jnp.float32)


def _merge_top(
    k: int, top: tuple[Float[Array, "T k"], Int[Array, "T k"]], scores: Float[Array, "T K"], ids: Int[Array, " K"]
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Merges the k largest scores so far with the scores of a block. Returns (scores, words)."""
    # Reduce the block to its own k largest scores first, so that the merge handles 2 k columns instead of k + K.
    scores, indices = jax.lax.top_k(scores, min(k, scores.shape[1]))
    scores = jnp.concatenate([top[0], scores], axis=1)
    ids = jnp.concatenate([top[1], jnp.take(ids, indices)], axis=1)
    scores, indices = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, indices, axis=1)


def _all_gather_top(
    k: int, top: tuple[Float[Array, "T k"], Int[Array, "T k"]], num_local_rows: int, axis_names: tuple[str, ...]
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Returns the k largest scores of all devices that share the vocabulary, and their words."""
    if not axis_names:
        return top
    scores, ids = top
    # Turn row numbers of this device into word ids.
    ids += jax.lax.axis_index(axis_names) * num_local_rows
    scores, ids = (jax.lax.all_gather(leaf, axis_names, axis=1, tiled=True) for leaf in (scores, ids))
    scores, indices = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, indices, axis=1)
