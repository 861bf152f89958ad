"""ALIGN's words of its own: one softmax over both kinds of words, in value, gradient, on a mesh and when pruned."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.inference.vocabulary import cache_vocabulary, prune_vocabulary, vocabulary_usage
from alignvlm_jax.models import layers
from alignvlm_jax.models.alignvlm import AlignVLM, add_extra_words, random_parameters
from alignvlm_jax.models.connectors import AlignConfig, make_connector
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.ops import dense
from tests.training.batches import MODEL, random_batch

EXTRA = 5
ON = dataclasses.replace(MODEL, connector=AlignConfig(num_extra_words=EXTRA))
WORDS, WIDTH, D_IN = 40, 16, 12


def joint_softmax(params, features, embedding):
    """Scores of all words side by side, and the values of all: what `extra_words.py` says its two sums are."""
    hidden = features @ params["w1"]["kernel"] + params["w1"]["bias"]
    query = layers.standardize(hidden, 1e-5) * params["hidden_norm"]["scale"] + params["hidden_norm"]["bias"]
    norm = query, params["w2"], params["vocab_norm_scale"], params["vocab_norm_bias"]
    _, mean, rate = dense.normalizers(*norm)
    extra = params["extra_words"]
    own = (query @ extra["keys"].T - mean[..., None]) * rate[..., None] * extra["scale"] + extra["bias"]
    p = jax.nn.softmax(jnp.concatenate([dense.scores(*norm), own], axis=-1), axis=-1)
    return p @ jnp.concatenate([embedding, extra["values"]]), p


@pytest.fixture(scope="module")
def small():
    """The connector alone, its parameters scattered, features and an embedding table."""
    rng = np.random.default_rng(0)
    features, embedding = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 9, D_IN), (WORDS, WIDTH)))
    connector = make_connector(AlignConfig(num_extra_words=EXTRA), output_size=WIDTH, dtype="float32")
    shapes = jax.eval_shape(lambda: connector.init(jax.random.key(0), features, embedding))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.normal(size=leaf.shape), jnp.float32), nn.unbox(shapes))
    return connector, params, features, embedding


def loss_of(connector):
    def loss(params, features, embedding):
        output = connector.apply({"params": params}, features, embedding)
        return jnp.sum(jnp.sin(output.tokens)), output

    return loss


def assert_close(got, wanted):
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert dense.distance(leaf, np.asarray(want)) <= 1e-5


def test_it_is_one_softmax_over_both_kinds_of_words(small):
    connector, params, *inputs = small

    def wanted_loss(params, *inputs):
        tokens, p = joint_softmax(params, *inputs)
        return jnp.sum(jnp.sin(tokens)), (tokens, p)

    gradients, output = jax.jit(jax.grad(loss_of(connector), (0, 1, 2), has_aux=True))(params, *inputs)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, *inputs))
        wanted, (tokens, p) = jax.jit(jax.grad(wanted_loss, (0, 1, 2), has_aux=True))(*wide)
    tokens, p = np.asarray(tokens), np.asarray(p)
    own = p[..., WORDS:].sum(-1)
    assert 0.05 < own.mean() < 0.95, "or one of the two kinds would not be tested"
    assert_close((output.tokens, output.entropy), (tokens, -np.sum(p * np.log(p), axis=-1)))
    assert_close(gradients, wanted)
    log_p = connector.apply({"params": params}, *inputs, method="log_distribution")
    assert_close(jnp.exp(log_p), p[..., :WORDS])
    _, summary = connector.apply({"params": params}, *inputs, top_k=3, method="describe")
    np.testing.assert_allclose(summary.top_probabilities, -np.sort(-p[..., :WORDS], axis=-1)[..., :3], rtol=1e-4)
    np.testing.assert_array_equal(summary.top_ids, np.argsort(-p[..., :WORDS], axis=-1)[..., :3])
    weights = jnp.asarray(np.random.default_rng(1).random(inputs[0].shape[:2]), jnp.float32)
    usage = connector.apply({"params": params}, *inputs, weights, method="usage")
    assert_close(usage, np.einsum("bn,bnv->v", weights, p[..., :WORDS]))


def test_a_mesh_changes_nothing(small):
    connector, params, *inputs = small
    wanted, output = jax.jit(jax.grad(loss_of(connector), (0, 1, 2), has_aux=True))(params, *inputs)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: connector.init(jax.random.key(0), *inputs))["params"]
    placed = jax.device_put(params, sharding.parameter_shardings(boxed, mesh))
    with jax.set_mesh(mesh), sharding.logical_rules():
        got = jax.jit(jax.grad(loss_of(connector), (0, 1, 2), has_aux=True))(placed, *inputs)
    assert_close(got, (wanted, output))


def test_off_nothing_is_there():
    params = nn.unbox(jax.eval_shape(lambda: random_parameters(MODEL, jax.random.key(0))))
    assert "extra_words" not in params["connector"]


@pytest.mark.parametrize("tied", [True, False])
def test_each_begins_as_the_twin_of_a_word(tied):
    config = dataclasses.replace(ON, language=dataclasses.replace(ON.language, tie_word_embeddings=tied))
    boxed = jax.jit(lambda: random_parameters(config, jax.random.key(0)))()
    spec = nn.get_partition_spec(boxed)["connector"]["extra_words"]
    assert spec["keys"] == jax.P("position", "embed"), "in the box it was declared in"
    params = nn.unbox(boxed)
    extra = params["connector"]["extra_words"]
    np.testing.assert_array_equal(extra["values"], params["language"]["embedding"][:EXTRA])
    connector = params["connector"]
    for name, of_words in (("keys", "w2"), ("scale", "vocab_norm_scale")):
        np.testing.assert_array_equal(extra[name], connector[of_words][:EXTRA])
    np.testing.assert_allclose(np.exp(extra["bias"] - connector["vocab_norm_bias"][:EXTRA]), 1 / 8, rtol=1e-6)


def test_a_trained_connector_can_be_given_words():
    """And it says nothing else, but for the eighth that the words add to their twins."""
    params = nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))())
    batch = random_batch(0)
    more = add_extra_words(ON, params)
    assert set(more["connector"]) - set(params["connector"]) == {"extra_words"}
    encode = functools.partial(jax.jit, static_argnums=0)(
        lambda model, params: model.apply(
            {"params": params}, batch["tiles"][0], batch["tile_valid_hw"][0], method="encode_images"
        )[0]
    )
    before, after = encode(AlignVLM(MODEL), params), encode(AlignVLM(ON), more)
    assert 0 < dense.distance(after, np.asarray(before)) < 0.1
    everyone = dataclasses.replace(MODEL, connector=AlignConfig(num_extra_words=MODEL.language.vocab_size))
    after = encode(AlignVLM(everyone), add_extra_words(everyone, params))
    assert dense.distance(after, np.asarray(before)) < 1e-5


def test_cached_statistics_and_pruning():
    """Of the vocabulary's words the pruned model knows a few, of its own all; the shares are those of the full one."""
    params = nn.unbox(jax.jit(lambda: random_parameters(ON, jax.random.key(0)))())
    batch = random_batch(0)
    page = batch["tiles"][0], batch["tile_valid_hw"][0]

    @functools.partial(jax.jit, static_argnums=1)
    def encode(variables, config=ON):
        def both(model):
            features = model.encode_features(*page)
            return model.encode_images(*page)[0], model.connector.log_distribution(features, model.language.embedding)

        return AlignVLM(config).apply(variables, method=both)

    tokens, log_p = encode({"params": params})
    cached = cache_vocabulary(ON, params)
    np.testing.assert_allclose(encode(cached)[0], tokens, rtol=1e-4, atol=1e-6)
    usage = vocabulary_usage(ON, cached, *page)
    words = MODEL.language.vocab_size
    config, everything = prune_vocabulary(ON, params, usage, words)
    np.testing.assert_allclose(encode({"params": everything}, config)[0], tokens, rtol=1e-4, atol=1e-5)
    config, pruned = prune_vocabulary(ON, params, usage, words // 2)
    kept = pruned["connector"]["word_ids"]
    p, own = np.exp(log_p)[..., kept], 1 - np.exp(log_p).sum(-1)
    _, pruned_log_p = encode({"params": pruned}, config)
    np.testing.assert_allclose(np.exp(pruned_log_p), p / (p.sum(-1) + own)[..., None], rtol=1e-3, atol=1e-6)
