"""Cached statistics change nothing; a pruned vocabulary changes as little as the mass it leaves out."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.vocabulary import OF_A_WORD, cache_vocabulary, prune_vocabulary, vocabulary_usage
from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters, stored_dtypes
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig
from alignvlm_jax.models.connectors.align import EXACT
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
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


@functools.partial(jax.jit, static_argnums=3)
def encode(variables, tiles, valid_hw, config=MODEL):
    """Visual tokens, and P."""

    def both(model):
        features = model.encode_features(tiles, valid_hw)
        log_p = model.connector.log_distribution(features, model.language.embedding)
        return model.encode_images(tiles, valid_hw)[0], jnp.exp(log_p)

    return AlignVLM(config).apply(variables, method=both)


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
    return usage, {which: prune_vocabulary(MODEL, params, usage, 36, statistics=which) for which in ("full", "kept")}


def test_pruning_keeps_the_most_used_words(params, pruned):
    usage, models = pruned
    config, pruned_params = models["full"]
    assert config == dataclasses.replace(MODEL, connector=AlignConfig(kept_words=36))
    words = pruned_params["connector"]["word_ids"]
    left_out = np.setdiff1d(np.arange(WORDS), words)
    assert len(words) == 36 and np.min(usage[words]) >= np.max(usage[left_out])
    for name in OF_A_WORD:
        kept = pruned_params["connector"][name]
        np.testing.assert_array_equal(kept, params["connector"][name][words])
    embedding = pruned_params["language"]["embedding"]
    assert embedding is params["language"]["embedding"], "the decoder keeps all of its words"


def test_with_full_statistics_p_is_that_of_the_full_model_on_the_words_kept(params, page, pruned):
    _, p = encode({"params": params}, *page)
    config, pruned_params = pruned[1]["full"]
    words = pruned_params["connector"]["word_ids"]
    on_kept = p[..., words]
    tokens, pruned_p = encode({"params": pruned_params}, *page, config)
    np.testing.assert_allclose(pruned_p, on_kept / on_kept.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)
    embedding = params["language"]["embedding"][words]
    np.testing.assert_allclose(tokens.reshape(-1, tokens.shape[-1]), pruned_p.reshape(-1, 36) @ embedding, atol=1e-5)


def test_full_statistics_match_the_full_model_better(params, page, pruned):
    tokens, _ = encode({"params": params}, *page)
    error = {
        which: float(jnp.linalg.norm(encode({"params": pruned_params}, *page, config)[0] - tokens))
        for which, (config, pruned_params) in pruned[1].items()
    }
    assert error["full"] < 0.5 * error["kept"]


def test_statistics_kept_are_those_of_a_model_that_never_had_the_other_words(page, pruned):
    """LN_V over the k rows, by hand."""
    config, pruned_params = pruned[1]["kept"]
    without = {name: leaf for name, leaf in pruned_params["connector"].items() if name not in EXACT}
    words = pruned_params["connector"]["word_ids"]
    language = {**pruned_params["language"], "embedding": pruned_params["language"]["embedding"][words]}
    small = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, vocab_size=36))
    expected, p = encode({"params": {**pruned_params, "connector": without, "language": language}}, *page, small)
    tokens, pruned_p = encode({"params": pruned_params}, *page, config)
    np.testing.assert_allclose(pruned_p, p, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=1e-5)


def test_a_pruned_model_has_the_parameters_that_its_config_says(pruned):
    config, pruned_params = pruned[1]["full"]
    expected = nn.unbox(jax.eval_shape(lambda: random_parameters(config, jax.random.key(0))))
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), pruned_params)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), expected)
    assert {name: found["connector"][name][1] for name in EXACT} == EXACT
    assert set(cache_vocabulary(config, pruned_params)) == {"params"}, "its statistics are parameters"
    stored = stored_dtypes(pruned_params, "bfloat16")
    assert stored["connector"]["w2"] == "bfloat16" and stored["connector"]["word_ids"] == "int32"


def test_its_likeliest_words_are_named_as_the_vocabulary_names_them(params, page, pruned):
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


def test_on_a_mesh_it_is_the_same(pruned):
    """36 words over eight devices, which do not divide them, and over four."""
    config, pruned_params = pruned[1]["full"]
    batch = random_batch(1)
    expected, _ = encode({"params": pruned_params}, batch["tiles"][0], batch["tile_valid_hw"][0], config)
    for sizes in (dict(fsdp=2, tensor=4), dict(tensor=8)):
        mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes}))
        boxed = jax.eval_shape(lambda: random_parameters(config, jax.random.key(0)))
        placed = jax.device_put(pruned_params, sharding.parameter_shardings(boxed, mesh))
        with jax.set_mesh(mesh), sharding.logical_rules():
            rows = sharding.shard_rows({name: batch[name][0] for name in ("tiles", "tile_valid_hw")}, mesh)
            encode.clear_cache()
            found, _ = encode({"params": placed}, rows["tiles"], rows["tile_valid_hw"], config)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_pruned_is_refused(params):
    with pytest.raises(UserError, match="k is 49"):
        prune_vocabulary(MODEL, params, np.ones(WORDS), WORDS + 1)
    pruned = prune_vocabulary(MODEL, params, np.ones(WORDS), 7)
    with pytest.raises(UserError, match="pruned to 7 words already"):
        prune_vocabulary(*pruned, np.ones(7), 5)
    with pytest.raises(UserError, match="7 words"):
        prune_vocabulary(MODEL, params, np.ones(7), 5)
    mlp = dataclasses.replace(MODEL, connector=MLPConfig())
    with pytest.raises(UserError, match="align"):
        prune_vocabulary(mlp, params, np.ones(WORDS), 5)
    assert set(cache_vocabulary(mlp, params)) == {"params"}
