"""Attention of trees: every kernel against a dense mask that is written down here, on random trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.ops import (
    attention,
    attention_flash,
    attention_splash,
    attention_tokamax,
)

PALLAS = {"splash": attention_splash, "tokamax": attention_tokamax, "flash": attention_flash}
KERNELS = ("cpu", "xla", *PALLAS)


def _rows(length, num_rows, seed=0):
    """Returns segments and branches of random rows: trees, ordinary examples between them, and padding at the end."""
    rng = np.random.default_rng(seed)
    segments, branches = np.zeros((2, num_rows, length), np.int32)
    for row in range(num_rows):
        start, segment = 0, 0
        while start < length * 0.9:
            segment += 1
            pieces = [(0, rng.integers(1, length // 5))]
            if rng.random() < 0.7:
                pieces += [(branch, rng.integers(1, length // 12)) for branch in range(1, rng.integers(2, 6))]
            for branch, size in pieces:
                segments[row, start : start + size], branches[row, start : start + size] = segment, branch
                start += size
    # Padding has no branch.
    segments[:, length - 3 :], branches[:, length - 3 :] = 0, 0
    return segments, branches


def _allowed(segments, branches):
    """Returns [B, L, L] from the definition, one pair at a time."""
    rows, length = segments.shape
    allowed = np.zeros((rows, length, length), bool)
    for row, query in np.ndindex(rows, length):
        for key in range(query + 1):
            same_segment = segments[row, query] == segments[row, key]
            allowed[row, query, key] = same_segment and branches[row, key] in (0, branches[row, query])
    return allowed


def _dense(query, key, value, allowed):
    repeats = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    scores = jnp.einsum("blhd,bkhd->bhlk", query, key) / np.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf))
    return jnp.einsum("bhlk,bkhd->blhd", weights, value)


def _heads(rows, length, heads=4, groups=2, width=8):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32) for n in (heads, groups, groups)]


@functools.cache
def _expected(length, num_rows, seed, has_branches=True):
    """Returns rows, inputs, and the values and gradients of dense attention in float64, without padding."""
    segments, branches = _rows(length, num_rows, seed)
    branches = branches * has_branches
    inputs = _heads(num_rows, length)
    cotangent = np.cos(np.asarray(inputs[0])) * (segments > 0)[..., None, None].astype(np.float32)
    allowed = _allowed(segments, branches)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in inputs]
        out, pull_back = jax.vjp(lambda *qkv: _dense(*qkv, allowed), *wide)
        expected = [np.array(array) for array in (out, *pull_back(cotangent.astype(np.float64)))]
        expected[0] *= (segments > 0)[..., None, None]
    return (segments, branches), inputs, cotangent, expected


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the Pallas kernels in the interpreter."""
    for module in PALLAS.values():
        monkeypatch.setattr(module, "attend", functools.partial(module.attend, interpret=True))
    monkeypatch.setattr(attention, "_obstacle", lambda *args: None)


def _check(kernel, case, branch_tokens=None, scores=None):
    (segments, branches), inputs, cotangent, expected = case
    is_real = jnp.asarray(segments > 0)[..., None, None]

    @jax.jit
    def with_gradients(*qkv):
        def attend(*qkv):
            ids = dict(segment_ids=jnp.asarray(segments), branch_ids=jnp.asarray(branches))
            return attention.packed_attention(*qkv, **ids, branch_tokens=branch_tokens, causal=True, kernel=kernel)

        out, pull_back = jax.vjp(attend, *qkv)
        return out * is_real, *pull_back(cotangent)

    for name, a, b in zip(("out", "query", "key", "value"), with_gradients(*inputs), expected, strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_the_dense_mask(kernel, interpreted):
    case = _expected(150, 3, seed=0)
    _check(kernel, case)


@pytest.mark.parametrize("kernel", ["cpu", "splash"])
def test_rows_without_branches(kernel, interpreted):
    _check(kernel, _expected(150, 3, seed=0, has_branches=False), branch_tokens=16)
