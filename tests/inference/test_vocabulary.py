"""Tests of cached statistics, which change nothing, and of pruned vocabularies."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.vocabulary import WORD_PARAMETERS, cache_vocabulary, prune_vocabulary, vocabulary_usage
from alignvlm_jax.models.alignvlm import AlignVLM, parameter_shapes, random_parameters, stored_dtypes
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig
from alignvlm_jax.models.connectors.align import EXACT
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.training.batches import MODEL, random_batch

WORDS = MODEL.language.vocab_size


@pytest.fixture(scope="module")
def params():
    """Parameters whose rows of W2 differ in length and mean, so that statistics depend on the rows; P is peaked."""
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


@functools.partial(jax.jit, static_argnums=3)
def encode(variables, tiles, valid_hw, config=MODEL):
    """Returns the visual tokens and P."""

    def tokens_and_p(model):
        features = model.encode_features(tiles, valid_hw)
        log_p = model.connector.log_distribution(features, model.language.embedding)
        return model.encode_images(tiles, valid_hw)[0], jnp.exp(log_p)

    return AlignVLM(config).apply(variables, method=tokens_and_p)


def test_cached_statistics_change_nothing(params, page):
    tokens, p = encode({"params": params}, *page)
    cached, cached_p = encode(cache_vocabulary(MODEL, params), *page)
    np.testing.assert_allclose(cached, tokens, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(cached_p, p, rtol=1e-4, atol=1e-6)


def test_usage_is_p_summed_over_valid_tiles(params, page):
    _, p = encode({"params": params}, *page)
    is_valid = np.asarray(page[1][..., 0] > 0).reshape(-1)
    assert 0 < is_valid.sum() < len(is_valid)
    usage = vocabulary_usage(MODEL, cache_vocabulary(MODEL, params), *page)
    np.testing.assert_allclose(usage, p[is_valid].sum((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pruned(params, page):
    """Usage, and the model pruned to three quarters of its words, with statistics of all rows or of the kept ones."""
    usage = vocabulary_usage(MODEL, {"params": params}, *page)
    return usage, {rows: prune_vocabulary(MODEL, params, usage, 36, statistics=rows) for rows in ("full", "kept")}


def test_pruning_keeps_the_most_used_words(params, pruned):
    usage, models = pruned
    config, pruned_params = models["full"]
    assert config == dataclasses.replace(MODEL, connector=AlignConfig(kept_words=36))
    words = pruned_params["connector"]["word_ids"]
    removed_words = np.setdiff1d(np.arange(WORDS), words)
    assert len(words) == 36 and np.min(usage[words]) >= np.max(usage[removed_words])
    for name in WORD_PARAMETERS:
        kept = pruned_params["connector"][name]
        np.testing.assert_array_equal(kept, params["connector"][name][words])
    embedding = pruned_params["language"]["embedding"]
    assert embedding is params["language"]["embedding"], "the decoder keeps its whole vocabulary"


def test_with_full_statistics_p_is_that_of_the_full_model_on_the_kept_words(params, page, pruned):
    _, p = encode({"params": params}, *page)
    config, pruned_params = pruned[1]["full"]
    words = pruned_params["connector"]["word_ids"]
    p_on_kept = p[..., words]
    tokens, pruned_p = encode({"params": pruned_params}, *page, config)
    np.testing.assert_allclose(pruned_p, p_on_kept / p_on_kept.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)
    embedding = params["language"]["embedding"][words]
    np.testing.assert_allclose(tokens.reshape(-1, tokens.shape[-1]), pruned_p.reshape(-1, 36) @ embedding, atol=1e-5)


def test_full_statistics_match_the_full_model_better(params, page, pruned):
    tokens, _ = encode({"params": params}, *page)
    error = {
        rows: float(jnp.linalg.norm(encode({"params": pruned_params}, *page, config)[0] - tokens))
        for rows, (config, pruned_params) in pruned[1].items()
    }
    assert error["full"] < 0.5 * error["kept"]


def test_kept_statistics_are_those_of_a_model_without_the_other_words(page, pruned):
    """Compares with an ALIGN of k words that is not pruned."""
    config, pruned_params = pruned[1]["kept"]
    connector = {name: leaf for name, leaf in pruned_params["connector"].items() if name not in EXACT}
    words = pruned_params["connector"]["word_ids"]
    language = {**pruned_params["language"], "embedding": pruned_params["language"]["embedding"][words]}
    small = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, vocab_size=36))
    expected, p = encode({"params": {**pruned_params, "connector": connector, "language": language}}, *page, small)
    tokens, pruned_p = encode({"params": pruned_params}, *page, config)
    np.testing.assert_allclose(pruned_p, p, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=1e-5)


def test_a_pruned_model_has_the_parameters_of_its_config(pruned):
    config, pruned_params = pruned[1]["full"]
    expected = nn.unbox(parameter_shapes(config))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), pruned_params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), expected)
    assert {name: shapes["connector"][name][1] for name in EXACT} == EXACT
    assert set(cache_vocabulary(config, pruned_params)) == {"params"}, "its statistics are parameters"
    stored = stored_dtypes(pruned_params, "bfloat16")
    assert stored["connector"]["w2"] == "bfloat16" and stored["connector"]["word_ids"] == "int32"


def test_the_most_likely_words_of_a_pruned_model_have_their_ids_in_the_vocabulary(params, page, pruned):
    config, pruned_params = pruned[1]["full"]

    @jax.jit
    def top_ids(params):
        def find(model):
            features = model.encode_features(*page)
            return model.connector.describe(features, model.language.embedding, top_k=1)[1].top_ids

        return AlignVLM(config).apply({"params": params}, method=find)

    _, p = encode({"params": params}, *page)
    words = np.asarray(pruned_params["connector"]["word_ids"])
    expected = words[np.argmax(np.asarray(p)[..., words], axis=-1)]
    np.testing.assert_array_equal(top_ids(pruned_params)[..., 0], expected)


def test_a_pruned_model_is_the_same_on_a_mesh(pruned):
    """Places 36 words on four devices, and on eight, which do not divide them."""
    config, pruned_params = pruned[1]["full"]
    batch = random_batch(1)
    expected, _ = encode({"params": pruned_params}, batch["tiles"][0], batch["tile_valid_hw"][0], config)
    for sizes in (dict(fsdp=2, tensor=4), dict(tensor=8)):
        mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes}))
        boxed = parameter_shapes(config)
        placed = jax.device_put(pruned_params, sharding.parameter_shardings(boxed, mesh))
        with jax.set_mesh(mesh), sharding.logical_rules():
            rows = sharding.shard_rows({name: batch[name][0] for name in ("tiles", "tile_valid_hw")}, mesh)
            encode.clear_cache()
            tokens, _ = encode({"params": placed}, rows["tiles"], rows["tile_valid_hw"], config)
        np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)


def test_invalid_pruning_is_refused(params):
    with pytest.raises(UserError, match="must be from 1 to 48, .* got 49"):
        prune_vocabulary(MODEL, params, np.ones(WORDS), WORDS + 1)
    pruned = prune_vocabulary(MODEL, params, np.ones(WORDS), 7)
    with pytest.raises(UserError, match="already pruned to 7 words"):
        prune_vocabulary(*pruned, np.ones(7), 5)
    with pytest.raises(UserError, match="usage has 7 words"):
        prune_vocabulary(MODEL, params, np.ones(7), 5)
    mlp = dataclasses.replace(MODEL, connector=MLPConfig())
    with pytest.raises(UserError, match="align"):
        prune_vocabulary(mlp, params, np.ones(WORDS), 5)
    assert set(cache_vocabulary(mlp, params)) == {"params"}
