"""Cached statistics change nothing; a pruned vocabulary changes as little as the mass it leaves out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.generate import Generator
from alignvlm_jax.inference.vocabulary import OF_A_WORD, cache_vocabulary, prune_vocabulary, vocabulary_usage
from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters
from alignvlm_jax.models.connectors import MLPConfig
from tests.training.batches import MODEL, random_batch

WORDS = MODEL.language.vocab_size


@pytest.fixture(scope="module")
def params():
    """ALIGN's rows differ in length and mean, so that statistics of some are not those of all; P is decided."""
    params = nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))())
    w2 = params["connector"]["w2"]
    noise = jax.random.normal(jax.random.key(1), w2.shape)
    w2 = noise * jnp.linspace(0.2, 2, WORDS)[:, None] + jnp.linspace(0, 1, WORDS)[:, None]
    scale = jnp.full((WORDS,), 4.0)
    return {**params, "connector": {**params["connector"], "w2": w2, "vocab_norm_scale": scale}}


@pytest.fixture(scope="module")
def page():
    batch = random_batch(0)
    return batch["tiles"][0], batch["tile_valid_hw"][0]


@jax.jit
def encode(variables, tiles, valid_hw):
    """Visual tokens, and P."""

    def both(model):
        features = model.encode_features(tiles, valid_hw)
        log_p = model.connector.log_distribution(features, model.language.embedding)
        return model.encode_images(tiles, valid_hw)[0], jnp.exp(log_p)

    return AlignVLM(MODEL).apply(variables, method=both)


def test_cached_statistics_change_nothing(params, page):
    tokens, p = encode({"params": params}, *page)
    cached, cached_p = encode(cache_vocabulary(MODEL, params), *page)
    np.testing.assert_allclose(cached, tokens, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cached_p, p, rtol=1e-4, atol=1e-6)


def test_usage_is_p_summed_over_real_tiles(params, page):
    _, p = encode({"params": params}, *page)
    real = np.asarray(page[1][..., 0] > 0).reshape(-1)
    assert 0 < real.sum() < len(real)
    usage = vocabulary_usage(MODEL, cache_vocabulary(MODEL, params), *page)
    np.testing.assert_allclose(usage, p[real].sum((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pruned(params, page):
    """Usage, and the model pruned to three quarters of its words with statistics of all rows, or of those kept."""
    usage = vocabulary_usage(MODEL, {"params": params}, *page)
    variables = {which: prune_vocabulary(MODEL, params, usage, 36, statistics=which) for which in ("full", "kept")}
    return usage, variables


def test_pruning_keeps_the_most_used_words(params, pruned):
    usage, variables = pruned
    words = variables["full"]["vocabulary"]["connector"]["words"]
    left_out = np.setdiff1d(np.arange(WORDS), words)
    assert len(words) == 36 and np.min(usage[words]) >= np.max(usage[left_out])
    for name in OF_A_WORD:
        kept = variables["full"]["params"]["connector"][name]
        np.testing.assert_array_equal(kept, params["connector"][name][words])
    embedding = variables["full"]["params"]["language"]["embedding"]
    assert embedding is params["language"]["embedding"], "the decoder keeps all of its words"


def test_with_full_statistics_p_is_that_of_the_full_model_on_the_words_kept(params, page, pruned):
    _, p = encode({"params": params}, *page)
    _, variables = pruned
    on_kept = p[..., variables["full"]["vocabulary"]["connector"]["words"]]
    tokens, pruned_p = encode(variables["full"], *page)
    np.testing.assert_allclose(pruned_p, on_kept / on_kept.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)
    embedding = params["language"]["embedding"][variables["full"]["vocabulary"]["connector"]["words"]]
    np.testing.assert_allclose(tokens.reshape(-1, tokens.shape[-1]), pruned_p.reshape(-1, 36) @ embedding, atol=1e-5)


def test_full_statistics_match_the_full_model_better(params, page, pruned):
    tokens, _ = encode({"params": params}, *page)
    error = {
        which: float(jnp.linalg.norm(encode(variables, *page)[0] - tokens)) for which, variables in pruned[1].items()
    }
    assert error["full"] < 0.5 * error["kept"]


def test_a_generator_answers_with_a_pruned_vocabulary(params, pruned):
    generator = Generator(MODEL, params, end_ids=(1,), pad_id=0)
    assert "statistics" in generator.variables["vocabulary"]["connector"]
    generator.prune_vocabulary(pruned[0], 36)
    jax.tree.map(np.testing.assert_array_equal, generator.variables, pruned[1]["full"])
    with pytest.raises(UserError, match="36"):
        generator.prune_vocabulary(pruned[0], 20)


def test_what_cannot_be_pruned_is_refused(params):
    with pytest.raises(UserError, match="k is 49"):
        prune_vocabulary(MODEL, params, np.ones(WORDS), WORDS + 1)
    with pytest.raises(UserError, match="7 words"):
        prune_vocabulary(MODEL, params, np.ones(7), 5)
    mlp = dataclasses.replace(MODEL, connector=MLPConfig())
    with pytest.raises(UserError, match="align"):
        prune_vocabulary(mlp, params, np.ones(WORDS), 5)
    assert set(cache_vocabulary(mlp, params)) == {"params"}
