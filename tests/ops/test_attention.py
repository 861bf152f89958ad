"""Values and gradients of attention against float64 references, at block borders and under masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.ops.attention import cached_attention, packed_attention


def _reference(query, key, value, allowed):
    """Computes plain softmax attention in float64; `allowed` is [B, L, K]."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    repeats = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, repeats, axis=2), np.repeat(value, repeats, axis=2)
    scores = np.einsum("blhd,bkhd->bhlk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(allowed[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhlk,bkhd->blhd", weights, value)


def _inputs(length, keys=None, heads=4, groups=2, width=8):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width), (2, keys or length, groups, width), (2, keys or length, groups, width)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("length", [1, 64, 65, 150])  # Queries come in blocks of 64.
@pytest.mark.parametrize("causal", [True, False])
def test_values_match_float64(length, causal):
    inputs = _inputs(length)
    allowed = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    expected = _reference(*inputs, np.broadcast_to(allowed, (2, length, length)))
    np.testing.assert_allclose(packed_attention(*inputs, causal=causal), expected, rtol=1e-5, atol=1e-5)


def test_segments_do_not_see_each_other():
    inputs = _inputs(100)
    segments = np.repeat([[1, 2, 3, 0]], 2, axis=0).repeat([30, 40, 20, 10], axis=1)
    allowed = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((100, 100), bool))
    out = packed_attention(*inputs, segment_ids=jnp.asarray(segments), causal=True)
    np.testing.assert_allclose(out, _reference(*inputs, allowed), rtol=1e-5, atol=1e-5)
    assert np.isfinite(out).all()  # Padding attends to padding, so no softmax is empty.


def test_gradients_match_plain_attention():
    query, key, value = _inputs(70)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)

    def plain(query, key, value):
        key, value = jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2)
        scores = jnp.einsum("blhd,bkhd->bhlk", query, key) / np.sqrt(8)
        scores = jnp.where(jnp.tril(jnp.ones((70, 70), bool)), scores, -jnp.inf)
        return jnp.sum(jnp.einsum("bhlk,bkhd->blhd", jax.nn.softmax(scores), value) * cotangent)

    def ours(query, key, value):
        return jnp.sum(packed_attention(query, key, value, causal=True) * cotangent)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (query, key, value)]
        expected = [np.asarray(gradient) for gradient in jax.grad(plain, (0, 1, 2))(*wide)]
    for got, reference in zip(jax.grad(ours, (0, 1, 2))(query, key, value), expected, strict=True):
        assert np.linalg.norm(got - reference) <= 1e-5 * np.linalg.norm(reference)


def test_invisible_cache_slots_have_no_effect():
    query, key, value = _inputs(3, keys=10)
    visible = np.random.default_rng(2).random((2, 3, 10)) < 0.5
    visible[..., 0] = True  # every query sees at least one slot, as in decoding
    cache = (key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3))
    out = cached_attention(query, *cache, visible=jnp.asarray(visible))
    np.testing.assert_allclose(out, _reference(query, key, value, visible), rtol=1e-5, atol=1e-5)
