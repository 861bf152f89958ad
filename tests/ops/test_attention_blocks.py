"""Blocks that the segments of packed rows need, and splash attention that skips the others, in Pallas's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.models.vision import VisionConfig, VisionEncoder
from alignvlm_jax.ops import attention, attention_splash
from alignvlm_jax.ops.attention_blocks import needed_blocks, next_needed
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh

LENGTH = 440  # four blocks of 128, the last one padded


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes blocks of 128 positions, and runs the kernel in the interpreter."""
    monkeypatch.setattr(attention_splash, "_ONE_BLOCK", 128)
    monkeypatch.setattr(attention_splash, "_BLOCK", 128)
    monkeypatch.setattr(attention_splash, "attend", functools.partial(attention_splash.attend, interpret=True))


def _row(*pieces):
    """Returns the segment ids of a row from (id, length) pieces; the last piece fills the row."""
    *pieces, (last, _) = pieces
    ids = [np.full(length, segment) for segment, length in pieces]
    used = sum(map(len, ids))
    return np.concatenate([*ids, np.full(LENGTH - used, last)])


def _random_rows(rng, rows):
    """Returns rows with segments of random lengths in random order; some ids repeat, and some are padding."""
    cuts = [np.sort(rng.choice(LENGTH, rng.integers(1, 7), replace=False)) for _ in range(rows)]
    return [np.repeat(rng.integers(0, 5, len(cut) + 1), np.diff([0, *cut, LENGTH])) for cut in cuts]


def _segmentations():
    rng = np.random.default_rng(0)
    chosen = [
        [_row((1, 0)), _row((0, 0))],  # one segment; padding only
        [_row((3, 150), (0, 140), (1, 60), (3, 0)), _row((1, 128), (2, 128), (3, 100), (0, 0))],
    ]
    return [jnp.asarray(np.stack(rows), jnp.int32) for rows in (*chosen, _random_rows(rng, 2), _random_rows(rng, 2))]


def _heads(rng, rows, heads=2, groups=1):
    shapes = [(rows, LENGTH, number, 8) for number in (heads, groups, groups, heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def _value_and_gradients(attend):
    """Returns a function of query, key, value, cotangent and segments that returns the result and its gradients."""

    def compute(query, key, value, cotangent, segment_ids):
        # Nothing in the model depends on the values at padding.
        cotangent = jnp.where((segment_ids > 0)[..., None, None], cotangent, 0)
        result, pull_back = jax.vjp(lambda *heads: attend(*heads, segment_ids), query, key, value)
        return result, *pull_back(cotangent)

    return jax.jit(compute)


def _without_skipping(query, key, value, segment_ids, *, causal):
    """Computes each row with JAX's own block tables, which know the causal mask but not the segments."""
    padded, block = attention_splash._padded_length(LENGTH)
    kernel = attention_splash._make_kernel(query.shape[2], padded, block, causal, True)

    def prepare(heads):
        return jnp.pad(heads, ((0, 0), (0, padded - LENGTH), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    ids = jnp.pad(segment_ids, ((0, 0), (0, padded - LENGTH)), constant_values=-1)
    ids = attention_splash._kernels().SegmentIds(ids, ids)
    attended = jax.vmap(kernel)(prepare(query * query.shape[-1] ** -0.5), prepare(key), prepare(value), ids)
    return attended.transpose(0, 2, 1, 3)[:, :LENGTH]


@pytest.mark.parametrize("causal", [True, False])
def test_skipping_changes_no_bit_of_real_positions(small_blocks, causal):
    ours = _value_and_gradients(functools.partial(attention_splash.attend, causal=causal))
    unskipped = _value_and_gradients(functools.partial(_without_skipping, causal=causal))
    plain = _value_and_gradients(
        lambda *heads: attention.packed_attention(*heads[:3], segment_ids=heads[3], causal=causal, kernel="xla")
    )
    for segment_ids in _segmentations():
        inputs = (*_heads(np.random.default_rng(1), 2), segment_ids)
        is_real = np.asarray(segment_ids > 0)
        for got, same, close in zip(ours(*inputs), unskipped(*inputs), plain(*inputs), strict=True):
            assert np.isfinite(got).all()
            np.testing.assert_array_equal(got[is_real], same[is_real])
            np.testing.assert_allclose(got[is_real], close[is_real], rtol=1e-4, atol=2e-6)


def test_blocks_of_other_segments_are_not_read(small_blocks):
    """A NaN in a block would reach every position that computes it, even where it is masked: 0 * NaN is NaN."""
    segment_ids = jnp.asarray(np.stack([_row((1, 128), (2, 128), (0, 0)), _row((7, 0))]), jnp.int32)
    inputs = _heads(np.random.default_rng(1), 2)
    poisoned = [heads.at[0, :128].set(np.nan).at[0, 256:].set(np.nan) for heads in inputs]
    run = _value_and_gradients(functools.partial(attention_splash.attend, causal=True))
    for got, clean in zip(run(*poisoned, segment_ids), run(*inputs, segment_ids), strict=True):
        np.testing.assert_array_equal(got[0, 128:256], clean[0, 128:256])
        np.testing.assert_array_equal(got[0, 256:], 0)
        np.testing.assert_array_equal(got[1], clean[1])
        assert np.isnan(got[0, :128]).all()


def test_on_a_mesh_each_device_skips_by_its_own_segments(small_blocks):
    rng = np.random.default_rng(2)
    segment_ids = jnp.asarray(np.stack(_random_rows(rng, 8)), jnp.int32)
    inputs = (*_heads(rng, 8, heads=4, groups=2), segment_ids)
    axes = attention.AttentionMesh(("data", "fsdp"), ("tensor",))

    def attend(kernel, query, key, value, segment_ids):
        return attention.packed_attention(
            query, key, value, segment_ids=segment_ids, causal=True, kernel=kernel, mesh_axes=axes
        )

    expected = _value_and_gradients(functools.partial(attend, "xla"))(*inputs)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))) as _, sharding.logical_rules():
        result = _value_and_gradients(functools.partial(attend, "splash"))(*inputs)
    is_real = np.asarray(segment_ids > 0)
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(got[is_real], want[is_real], rtol=1e-4, atol=2e-6)


def test_the_encoder_skips_tiles_of_padding(small_blocks):
    config = VisionConfig(16, 4, 16, 32, num_layers=2, num_heads=2, attention="splash", dtype="float32")
    encoder = VisionEncoder(config)
    tiles = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 3)), jnp.float32)
    is_real = jnp.array([True, False, True])
    params = encoder.init(jax.random.key(0), tiles)

    @jax.jit
    def run(params, is_real):
        def loss(params):
            features = encoder.apply(params, tiles, is_real)
            return jnp.sum(features[::2] ** 2), features

        (_, features), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return features, gradients

    features, gradients = run(params, is_real)
    every_tile, every_gradient = run(params, jnp.ones(3, bool))
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(features[::2], every_tile[::2])
    assert not np.allclose(features[1], every_tile[1]), "the attention of the padding tile is skipped"
    jax.tree.map(np.testing.assert_array_equal, gradients, every_gradient)
    # A tile is one block. The padding tile needs none.
    segment_ids = jnp.repeat(is_real[:, None].astype(jnp.int32), config.num_patches, axis=1)
    assert attention_splash.executed_blocks(segment_ids, causal=False) == {"fwd": 2, "dq": 2, "dkv": 2}


def test_bins_of_two_pages_run_half_of_the_blocks():
    ids = np.repeat([[1, 2, 0]], [7424, 7000, 14_848 - 14_424], axis=1)
    assert attention_splash.num_blocks(14_848) == 29 and attention_splash.block_size(14_848) == 512
    # The second page begins in the middle of block 14: 15 blocks of queries each, in two triangles that overlap in it.
    # The last block has both the second page and padding.
    blocks = attention_splash.executed_blocks(jnp.asarray(ids), causal=True)
    assert blocks == dict.fromkeys(("fwd", "dq", "dkv"), 2 * 15 * 16 // 2 - 1)
    one_page = attention_splash.executed_blocks(jnp.ones((2, 14_848), jnp.int32), causal=True)
    assert one_page == dict.fromkeys(("fwd", "dq", "dkv"), 2 * 29 * 30 // 2)


def test_needed_blocks_are_those_that_share_a_segment():
    rng = np.random.default_rng(0)
    many = np.repeat(np.arange(1, 221), 2)  # more ascending segments than the residues that other orders use
    for row in [many, *_random_rows(rng, 20), *(rng.permutation(100)[many // 3] for _ in range(5))]:
        blocks = row.reshape(-1, 40)
        exact = [[bool((set(a) & set(b)) - {0}) for b in blocks] for a in blocks]
        np.testing.assert_array_equal(needed_blocks(jnp.asarray(row[None]), 40, causal=False)[0], exact)
        np.testing.assert_array_equal(needed_blocks(jnp.asarray(row[None]), 40, causal=True)[0], np.tril(exact))
    # Large ids in any order: a block that is needed is never left out.
    for row in rng.integers(0, 2**31 - 1, (20, 11))[:, :, None].repeat(40, axis=2).reshape(20, -1):
        assert np.asarray(needed_blocks(jnp.asarray(row[None], jnp.int32), 88, causal=False))[0].diagonal().all()


def test_a_skipped_step_loads_what_the_next_step_needs():
    needed = jnp.array([[False, True, False, False, True, False], [False] * 6])
    np.testing.assert_array_equal(next_needed(needed), [[1, 1, 4, 4, 4, 4], [0] * 6])


def test_unknown_block_tables_are_an_error(small_blocks, monkeypatch):
    make = attention_splash._make_kernel
    wide = functools.partial(make, 2, 1024)  # the tables of another length

    monkeypatch.setattr(attention_splash, "_make_kernel", lambda heads, length, *rest: wide(*rest))
    inputs = _heads(np.random.default_rng(0), 1)[:3]
    with pytest.raises(UserError, match="other block tables than expected"):
        attention_splash.attend(*inputs, jnp.ones((1, LENGTH), jnp.int32), causal=True)
