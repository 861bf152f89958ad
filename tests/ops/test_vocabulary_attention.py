"""ALIGN's attention over the vocabulary against the dense form in float64: value and the gradient of every input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.ops import vocabulary_attention, vocabulary_statistics, vocabulary_usage
from alignvlm_jax.ops.vocabulary_statistics import covariance_is_cheaper
from alignvlm_jax.ops.vocabulary_streaming import default_block_size
from tests.ops import dense

TOLERANCE = 5e-6  # relative, norm-wise
NAMES = ("result", "q", "keys", "scale", "bias", "values")


def inputs(shape=(3, 20), width=16, words=100, value_width=12, dtype=jnp.float32, seed=0):
    """Keys and values share a large mean vector, as embedding tables do; scale and bias differ from word to word."""
    rng = np.random.default_rng(seed)
    keys = 0.3 * rng.normal(size=(words, width)) + rng.normal(size=width)
    values = 0.3 * rng.normal(size=(words, value_width)) + rng.normal(size=value_width)
    arrays = [
        rng.normal(size=(*shape, width)),
        keys,
        2 + 0.5 * rng.normal(size=words),
        0.5 * rng.normal(size=words),
        values,
    ]
    return [jnp.asarray(array, dtype) for array in arrays]


def with_gradients(function):
    """From (arguments of `function`, cotangent of its result) to [result, *gradients of the arguments], compiled."""

    @jax.jit
    def run(arguments, cotangent):
        value, pull_back = jax.vjp(function, *arguments)
        return [value, *pull_back(cotangent.astype(value.dtype))]

    return run


def exactly(function, arguments, cotangent):
    """The same in float64."""
    return dense.in_float64(lambda *leaves: with_gradients(function)(leaves[:-1], leaves[-1]), *arguments, cotangent)


def some_cotangent(arguments):
    """Of a result's shape, and as exact in bfloat16 as in float64."""
    shape = (*arguments[0].shape[:-1], arguments[4].shape[1])
    return jnp.asarray(np.random.default_rng(9).normal(size=shape), jnp.bfloat16).astype(jnp.float32)


def assert_is_dense(arguments, *, slack=0.0, **options):
    """Within the tolerance, or within `slack` times the error that the dense form itself has in float32."""
    cotangent = some_cotangent(arguments)
    ours = with_gradients(functools.partial(vocabulary_attention, **options))(arguments, cotangent)
    wanted = exactly(dense.vocabulary_attention, arguments, cotangent)
    theirs = with_gradients(dense.vocabulary_attention)(arguments, cotangent) if slack else wanted
    for name, got, same, want in zip(NAMES, ours, theirs, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        assert dense.distance(got, want) <= max(TOLERANCE, slack * dense.distance(same, want)), name


# 3 queries of width 16: statistics from another pass; 60: from the covariance.
@pytest.mark.parametrize("shape", [(3,), (3, 20)])
@pytest.mark.parametrize("block_size", [1, 50, 99, None])
def test_value_and_every_gradient(shape, block_size):
    assert covariance_is_cheaper(int(np.prod(shape)), 16) == (shape == (3, 20))
    assert_is_dense(inputs(shape), block_size=block_size)


def test_any_leading_shape():
    q, *tables = inputs((30,))
    cotangent = some_cotangent([q, *tables])
    flat = with_gradients(vocabulary_attention)([q, *tables], cotangent)
    cut = with_gradients(vocabulary_attention)([q.reshape(2, 3, 5, 16), *tables], cotangent.reshape(2, 3, 5, 12))
    assert cut[0].shape == (2, 3, 5, 12) and cut[1].shape == (2, 3, 5, 16)
    row = with_gradients(vocabulary_attention)([q[:1], *tables], cotangent[:1])
    alone = with_gradients(vocabulary_attention)([q[0], *tables], cotangent[0])
    assert alone[0].shape == (12,) and alone[1].shape == (16,)
    for ours, same in ((cut, flat), (alone, row)):
        for got, want in zip(ours, same, strict=True):
            np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_a_vocabulary_and_widths_without_common_factors():
    assert_is_dense(inputs((47,), width=19, words=101, value_width=7), block_size=13)


def test_a_width_that_is_cut_into_panels():
    """The covariance is computed on and above its diagonal of panels only."""
    assert_is_dense(inputs((600,), width=512, words=700, value_width=8), block_size=256)


@pytest.mark.parametrize("shape", [(8,), (60,)])
def test_decided_distributions(shape):
    """A scale at which almost all of P lies on one word: the largest score rises again and again, by a lot."""
    q, keys, scale, bias, values = inputs(shape)
    order = jnp.argsort((q @ keys.T)[0])  # ever better words for the first query
    arguments = [q, keys[order], 10 * scale, bias, values]
    p = jax.nn.softmax(dense.scores(*arguments[:4]))
    assert jnp.max(p[0]) > 0.9
    # Scores of 40 are rounded to 2e-6, and P with them, in the dense form too.
    assert_is_dense(arguments, block_size=8, slack=2.0)


def test_statistics_of_frozen_keys():
    """Value and gradients as with the statistics of the dense form held constant."""
    arguments = inputs((3, 20))
    cotangent = some_cotangent(arguments)

    def frozen(q, keys, scale, bias, values):
        centred = keys - jnp.mean(keys, axis=0)
        mean, covariance = jax.lax.stop_gradient((jnp.mean(keys, axis=0), centred.T @ centred / len(keys)))
        variance = jnp.einsum("...d,de,...e->...", q, covariance, q)
        normed = (q @ keys.T - (q @ mean)[..., None]) / jnp.sqrt(variance + 1e-5)[..., None]
        return jax.nn.softmax(normed * scale + bias) @ values

    statistics = jax.jit(vocabulary_statistics)(arguments[1])
    streamed = functools.partial(vocabulary_attention, statistics=statistics, block_size=32)
    ours = with_gradients(streamed)(arguments, cotangent)
    for name, got, want in zip(NAMES, ours, exactly(frozen, arguments, cotangent), strict=True):
        assert dense.distance(got, want) <= TOLERANCE, name


@pytest.mark.parametrize("shape", [(8,), (120,)])
def test_bfloat16_is_no_worse_than_the_dense_form_in_bfloat16(shape):
    """Both against float64. The dense form rounds what it keeps: logits and P, and their gradients."""
    arguments = inputs(shape, width=32, words=500, dtype=jnp.bfloat16)
    cotangent = some_cotangent(arguments)

    def dense_form(q, keys, scale, bias, values):
        logits = (q @ keys.T).astype(jnp.float32)
        centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
        return jax.nn.softmax(normed * scale + bias).astype(values.dtype) @ values

    ours = with_gradients(functools.partial(vocabulary_attention, block_size=128))(arguments, cotangent)
    theirs = with_gradients(dense_form)(arguments, cotangent)
    wanted = exactly(dense.vocabulary_attention, arguments, cotangent)
    for name, got, same, want in zip(NAMES, ours, theirs, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        # A fifth more, since either is a sum of roundings; a sum kept in bfloat16 would be several times off.
        assert dense.distance(got, want) <= 1.2 * dense.distance(same, want), name


def test_float32_tables_under_bfloat16_queries():
    """Tables are cast a block at a time, and their gradients stay in float32."""
    q, *tables = inputs((120,))
    q = q.astype(jnp.bfloat16)
    gradient = jax.grad(lambda *a: jnp.sum(vocabulary_attention(*a).astype(jnp.float32)), range(5))
    assert [leaf.dtype for leaf in jax.eval_shape(gradient, q, *tables)] == [jnp.bfloat16] + [jnp.float32] * 4


@pytest.mark.parametrize(("top_k", "entropy"), [(0, True), (7, False), (100, True)])
def test_entropy_and_largest_probabilities(top_k, entropy):
    arguments = inputs((3, 5))
    streamed = jax.jit(functools.partial(vocabulary_attention, top_k=top_k, entropy=entropy, block_size=32))
    value, summary = streamed(*arguments)
    p = dense.in_float64(lambda *a: jax.nn.softmax(dense.scores(*a)), *arguments[:4])
    assert dense.distance(value, p @ np.asarray(arguments[4], float)) <= TOLERANCE
    if entropy:
        np.testing.assert_allclose(summary.entropy, dense.entropy(p), rtol=1e-5)
    else:
        assert summary.entropy is None
    if top_k:
        np.testing.assert_allclose(summary.top_probabilities, -np.sort(-p, axis=-1)[..., :top_k], rtol=1e-4)
        np.testing.assert_array_equal(summary.top_ids, np.argsort(-p, axis=-1)[..., :top_k])
    else:
        assert summary.top_ids is None


def test_what_is_said_of_p_leaves_the_gradient_alone():
    arguments = inputs((60,))

    def loss(q):
        value, summary = vocabulary_attention(q, *arguments[1:], entropy=True, top_k=3)
        return jnp.sum(value) + jnp.sum(summary.entropy) + jnp.sum(summary.top_probabilities)

    plain = jax.jit(jax.grad(lambda q: jnp.sum(vocabulary_attention(q, *arguments[1:]))))(arguments[0])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(arguments[0]), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [32, None])
def test_usage_is_the_weighted_sum_of_p(block_size):
    q, keys, scale, bias, _ = inputs((3, 5))
    weights = np.random.default_rng(3).random((3, 5))
    p = dense.in_float64(lambda *a: jax.nn.softmax(dense.scores(*a)), q, keys, scale, bias)
    usage = vocabulary_usage(q, keys, scale, bias, weights=jnp.asarray(weights), block_size=block_size)
    assert dense.distance(usage, np.einsum("ab,abv->v", weights, p)) <= TOLERANCE
    assert dense.distance(vocabulary_usage(q, keys, scale, bias), p.sum((0, 1))) <= TOLERANCE


def test_gradients_inside_a_scan_and_under_rematerialisation():
    """How the train step calls it: microbatches in a scan, a rematerialised loss."""
    arguments = inputs((4, 15))

    def one(q):
        return jnp.sum(vocabulary_attention(q, *arguments[1:], block_size=32) ** 2)

    plain = jax.jit(lambda q: jnp.stack([jax.grad(one)(row) for row in q]))(arguments[0])
    body = jax.grad(jax.checkpoint(one))
    scanned = jax.jit(lambda q: jax.lax.scan(lambda carry, row: (carry, body(row)), 0, q)[1])(arguments[0])
    assert dense.distance(scanned, np.asarray(plain, float)) <= TOLERANCE


def test_blocks_are_chosen_by_the_queries_and_larger_without_a_gradient():
    sizes = {t: (default_block_size(t), default_block_size(t, inference=True)) for t in (1, 729, 16384, 131072, 10**7)}
    assert sizes == {1: (4096, 8192), 729: (4096, 8192), 16384: (4096, 8192), 131072: (512, 1024), 10**7: (256, 256)}
