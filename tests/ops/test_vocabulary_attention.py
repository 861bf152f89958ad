"""Values and gradients of ALIGN's attention over the vocabulary, against the dense form in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.ops import vocabulary_attention, vocabulary_statistics, vocabulary_usage
from alignvlm_jax.ops.dense_align import dense_distribution, dense_vocabulary_attention
from alignvlm_jax.ops.vocabulary_statistics import covariance_is_cheaper
from alignvlm_jax.ops.vocabulary_streaming import default_block_size
from tests.ops import dense

TOLERANCE = 5e-6  # norm of the difference, relative to the norm of the reference
NAMES = ("result", "q", "keys", "scale", "bias", "values")


def inputs(shape=(3, 20), width=16, words=100, value_width=12, dtype=jnp.float32, seed=0):
    """Returns q, keys, scale, bias and values.

    The rows of keys and values have a large common mean, as those of embedding tables do. Scale and bias differ between
    words.
    """
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
    """Returns a compiled function from (arguments, cotangent) to [value, *gradients of the arguments]."""

    @jax.jit
    def run(arguments, cotangent):
        value, pull_back = jax.vjp(function, *arguments)
        return [value, *pull_back(cotangent.astype(value.dtype))]

    return run


def in_float64(function, arguments, cotangent):
    """Returns value and gradients of `function` in float64."""
    return dense.in_float64(lambda *leaves: with_gradients(function)(leaves[:-1], leaves[-1]), *arguments, cotangent)


def random_cotangent(arguments):
    """Returns a cotangent of the result whose values are exact in bfloat16."""
    shape = (*arguments[0].shape[:-1], arguments[4].shape[1])
    return jnp.asarray(np.random.default_rng(9).normal(size=shape), jnp.bfloat16).astype(jnp.float32)


def assert_matches_dense(arguments, *, slack=0.0, **options):
    """Asserts that errors are below the tolerance, or below `slack` times those of the dense form in float32."""
    cotangent = random_cotangent(arguments)
    ours = with_gradients(functools.partial(vocabulary_attention, **options))(arguments, cotangent)
    expected = in_float64(dense_vocabulary_attention, arguments, cotangent)
    theirs = with_gradients(dense_vocabulary_attention)(arguments, cotangent) if slack else expected
    for name, got, rounded, reference in zip(NAMES, ours, theirs, expected, strict=True):
        assert got.shape == reference.shape and got.dtype == jnp.float32
        assert dense.distance(got, reference) <= max(TOLERANCE, slack * dense.distance(rounded, reference)), name


# The statistics of logits come from a second pass for 3 queries of width 16, and from the covariance for 60.
@pytest.mark.parametrize("shape", [(3,), (3, 20)])
# Of 100 words: blocks of one word, two equal blocks, a block and a remainder of one word, and a single block.
@pytest.mark.parametrize("block_size", [1, 50, 99, None])
def test_value_and_every_gradient_match_the_dense_form(shape, block_size):
    assert covariance_is_cheaper(int(np.prod(shape)), 16) == (shape == (3, 20))
    assert_matches_dense(inputs(shape), block_size=block_size)


def test_queries_may_have_any_leading_shape():
    q, *tables = inputs((30,))
    cotangent = random_cotangent([q, *tables])
    flat = with_gradients(vocabulary_attention)([q, *tables], cotangent)
    reshaped = with_gradients(vocabulary_attention)([q.reshape(2, 3, 5, 16), *tables], cotangent.reshape(2, 3, 5, 12))
    assert reshaped[0].shape == (2, 3, 5, 12) and reshaped[1].shape == (2, 3, 5, 16)
    row = with_gradients(vocabulary_attention)([q[:1], *tables], cotangent[:1])
    alone = with_gradients(vocabulary_attention)([q[0], *tables], cotangent[0])
    assert alone[0].shape == (12,) and alone[1].shape == (16,)
    for ours, expected in ((reshaped, flat), (alone, row)):
        for got, reference in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(got.reshape(reference.shape), reference)


def test_sizes_without_common_factors():
    assert_matches_dense(inputs((47,), width=19, words=101, value_width=7), block_size=13)


def test_a_width_that_is_split_into_panels():
    """At this width, only the panels on and above the diagonal of the covariance are computed."""
    assert_matches_dense(inputs((600,), width=512, words=700, value_width=8), block_size=256)


@pytest.mark.parametrize("shape", [(8,), (60,)])
def test_peaked_distributions(shape):
    """A large scale puts almost all of P on one word, and the running maximum rises a lot in every block."""
    q, keys, scale, bias, values = inputs(shape)
    order = jnp.argsort((q @ keys.T)[0])  # Words in increasing order of the first query's logits.
    arguments = [q, keys[order], 10 * scale, bias, values]
    p = dense_distribution(*arguments[:4])
    assert jnp.max(p[0]) > 0.9
    # Scores near 40 are rounded to 2e-6, and so is P. The dense form has the same error, hence `slack`.
    assert_matches_dense(arguments, block_size=8, slack=2.0)


def test_given_statistics_are_treated_as_constants():
    """With precomputed statistics of frozen keys, gradients match a dense form that stops gradients through them."""
    arguments = inputs((3, 20))
    cotangent = random_cotangent(arguments)

    def frozen(q, keys, scale, bias, values):
        centered = keys - jnp.mean(keys, axis=0)
        mean, covariance = jax.lax.stop_gradient((jnp.mean(keys, axis=0), centered.T @ centered / len(keys)))
        variance = jnp.einsum("...d,de,...e->...", q, covariance, q)
        normed = (q @ keys.T - (q @ mean)[..., None]) / jnp.sqrt(variance + 1e-5)[..., None]
        return jax.nn.softmax(normed * scale + bias) @ values

    statistics = jax.jit(vocabulary_statistics)(arguments[1])
    streamed = functools.partial(vocabulary_attention, statistics=statistics, block_size=32)
    ours = with_gradients(streamed)(arguments, cotangent)
    for name, got, reference in zip(NAMES, ours, in_float64(frozen, arguments, cotangent), strict=True):
        assert dense.distance(got, reference) <= TOLERANCE, name


@pytest.mark.parametrize("shape", [(8,), (120,)])
def test_bfloat16_is_no_worse_than_the_dense_form_in_bfloat16(shape):
    """Both are compared with float64. The dense form rounds logits, P, and their gradients to bfloat16."""
    arguments = inputs(shape, width=32, words=500, dtype=jnp.bfloat16)
    cotangent = random_cotangent(arguments)

    def dense_form(q, keys, scale, bias, values):
        logits = (q @ keys.T).astype(jnp.float32)
        centered = logits - jnp.mean(logits, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5)
        return jax.nn.softmax(normed * scale + bias).astype(values.dtype) @ values

    ours = with_gradients(functools.partial(vocabulary_attention, block_size=128))(arguments, cotangent)
    theirs = with_gradients(dense_form)(arguments, cotangent)
    expected = in_float64(dense_vocabulary_attention, arguments, cotangent)
    for name, got, rounded, reference in zip(NAMES, ours, theirs, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # 20 % more, because both errors are sums of random roundings. A sum in bfloat16 would be several times worse.
        assert dense.distance(got, reference) <= 1.2 * dense.distance(rounded, reference), name


def test_float32_tables_keep_float32_gradients_under_bfloat16_queries():
    """Tables are cast to bfloat16 one block at a time; their gradients must stay in float32."""
    q, *tables = inputs((120,))
    q = q.astype(jnp.bfloat16)
    gradient = jax.grad(lambda *a: jnp.sum(vocabulary_attention(*a).astype(jnp.float32)), range(5))
    assert [leaf.dtype for leaf in jax.eval_shape(gradient, q, *tables)] == [jnp.bfloat16] + [jnp.float32] * 4


@pytest.mark.parametrize(("top_k", "entropy"), [(0, True), (7, False), (100, True)])
def test_entropy_and_top_words_match_the_dense_form(top_k, entropy):
    arguments = inputs((3, 5))
    streamed = jax.jit(functools.partial(vocabulary_attention, top_k=top_k, entropy=entropy, block_size=32))
    value, summary = streamed(*arguments)
    p = dense.in_float64(dense_distribution, *arguments[:4])
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


def test_the_summary_does_not_change_the_gradient():
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
    p = dense.in_float64(dense_distribution, q, keys, scale, bias)
    usage = vocabulary_usage(q, keys, scale, bias, weights=jnp.asarray(weights), block_size=block_size)
    assert dense.distance(usage, np.einsum("ab,abv->v", weights, p)) <= TOLERANCE
    assert dense.distance(vocabulary_usage(q, keys, scale, bias), p.sum((0, 1))) <= TOLERANCE


def test_gradients_are_the_same_in_a_scan_and_under_rematerialization():
    """The train step uses it this way: microbatches in a scan, with a rematerialized loss."""
    arguments = inputs((4, 15))

    def loss(q):
        return jnp.sum(vocabulary_attention(q, *arguments[1:], block_size=32) ** 2)

    plain = jax.jit(lambda q: jnp.stack([jax.grad(loss)(row) for row in q]))(arguments[0])
    body = jax.grad(jax.checkpoint(loss))
    scanned = jax.jit(lambda q: jax.lax.scan(lambda carry, row: (carry, body(row)), 0, q)[1])(arguments[0])
    assert dense.distance(scanned, np.asarray(plain, float)) <= TOLERANCE


def test_the_block_size_depends_on_the_queries_and_is_larger_without_gradient():
    sizes = {t: (default_block_size(t), default_block_size(t, inference=True)) for t in (1, 729, 16384, 131072, 10**7)}
    assert sizes == {1: (4096, 8192), 729: (4096, 8192), 16384: (4096, 8192), 131072: (512, 1024), 10**7: (256, 256)}
