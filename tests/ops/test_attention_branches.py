"""Attention of trees: every kernel against a dense mask that is written down here, on random trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.models import rematerialization
from alignvlm_jax.ops import (
    attention,
    attention_branches,
    attention_cpu,
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
            if row > 0 and rng.random() < 0.7:  # the first row has no branches
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
def _case():
    """Returns ids, inputs, a cotangent, and the values and gradients of dense attention in float64, without padding."""
    ids = segments, branches = _rows(150, 3)
    inputs = _heads(3, 150)
    is_real = (segments > 0)[..., None, None].astype(np.float32)
    cotangent = np.cos(np.asarray(inputs[0])) * is_real
    allowed = _allowed(segments, branches)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (*inputs, cotangent)]

        @jax.jit
        def dense(*qkv, cotangent):
            out, pull_back = jax.vjp(lambda *qkv: _dense(*qkv, allowed), *qkv)
            return out * is_real, *pull_back(cotangent)

        expected = [np.asarray(array) for array in dense(*wide[:3], cotangent=wide[3])]
    return ids, inputs, cotangent, expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_the_dense_mask(kernel, monkeypatch):
    """The fullest row has as many branch tokens as the budget, and one row has none."""
    if kernel in PALLAS:
        monkeypatch.setattr(PALLAS[kernel], "attend", functools.partial(PALLAS[kernel].attend, interpret=True))
        monkeypatch.setattr(attention, "_obstacle", lambda *args: None)
        monkeypatch.setattr(attention_branches, "_BLOCK_BYTES", 1 << 16)  # several blocks of slots
    (segments, branches), inputs, cotangent, expected = _case()
    budget = int((branches > 0).sum(axis=1).max())
    ids = dict(segment_ids=jnp.asarray(segments), branch_ids=jnp.asarray(branches), branch_tokens=budget)

    @jax.jit
    def with_gradients(*qkv):
        def attend(*qkv):
            return attention.packed_attention(*qkv, **ids, causal=True, kernel=kernel)

        out, pull_back = jax.vjp(attend, *qkv)
        return out * (ids["segment_ids"] > 0)[..., None, None], *pull_back(cotangent)

    for name, a, b in zip(("out", "query", "key", "value"), with_gradients(*inputs), expected, strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), name


def _attend_pages(query, key, value, segment_ids, *, causal):
    return attention.packed_attention(query, key, value, segment_ids=segment_ids, causal=causal)


def test_pages_do_not_depend_on_branches():
    (segments, branches), inputs, _, _ = _case()
    ids = jnp.asarray(segments), jnp.asarray(branches)
    is_branch = (ids[1] > 0)[..., None, None]
    attend = jax.jit(functools.partial(attention_branches.attend, _attend_pages, 150, causal=True))
    changed = [jnp.where(is_branch, 9 - array, array) for array in inputs]
    is_page = (branches == 0) & (segments > 0)
    np.testing.assert_array_equal(attend(*changed, *ids)[is_page], attend(*inputs, *ids)[is_page])


def test_a_row_above_the_budget_has_no_wrong_values():
    (segments, branches), inputs, _, _ = _case()
    counts = (branches > 0).sum(axis=1)
    budget = int(counts.max()) - 1
    ids = jnp.asarray(segments), jnp.asarray(branches)
    out = attention_branches.attend(_attend_pages, budget, *inputs, *ids, causal=True)
    is_lost = np.isnan(out).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(is_lost, counts > budget)


def test_policies_keep_no_scores_of_branches():
    """The policy "dots" keeps the products of linear layers. Scores would be as large as all of them together."""
    segments, branches = _rows(150, 1, seed=1)
    inputs = _heads(1, 150)
    policy = rematerialization.policy("attention_out,dots")

    def attend(*qkv):
        ids = jnp.asarray(segments), jnp.asarray(branches)
        return jnp.sum(attention_branches.attend(_attend_pages, 64, *qkv, *ids, causal=True) ** 2)

    # The function that `jax.vjp` returns is a tree of what it keeps.
    kept = jax.eval_shape(lambda *qkv: jax.vjp(jax.checkpoint(attend, policy=policy), *qkv)[1], *inputs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.float32]
    assert (1, 64, 4, 8) in shapes, "the results of the slots"
    assert not any(shape[-1] == 150 for shape in shapes), "scores"


def test_branches_need_segments_and_causal_attention():
    inputs, ids = _heads(1, 4), jnp.zeros((1, 4), jnp.int32)
    for arguments in (dict(causal=True), dict(segment_ids=ids, causal=False)):
        with pytest.raises(ValueError, match="branch_ids"):
            attention.packed_attention(*inputs, branch_ids=ids, **arguments)


def test_cpu_kernel_skips_siblings():
    """A block of branches needs the page and itself."""
    segments = jnp.ones((4, 1, 10), jnp.int32)
    branches = jnp.repeat(jnp.array([0, 1, 2, 3]), 10).reshape(4, 1, 10)
    needed = attention_cpu._needed_pairs(attention_cpu._Ids(segments, branches), True)
    np.testing.assert_array_equal(needed, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])
