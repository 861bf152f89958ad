"""Tests of decoding with unstacked weights: views, equal answers, and no copy of the cache in a step."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignvlm_jax.models.language import LanguageConfig, LanguageModel, empty_cache
from alignvlm_jax.models.unstacking import unstack_layers, with_layers

CONFIG = LanguageConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, rope_theta=1e4
)
ROWS, SLOTS, PROMPT = 5, 24, 7


@pytest.fixture(scope="module")
def stacked():
    ids = jnp.ones((1, 2), int)
    init = jax.jit(
        lambda: LanguageModel(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2, 32)), positions=ids, segment_ids=ids)
    )
    return {"params": {"language": nn.unbox(init())["params"]}}


def step(variables, tokens, cache):
    def run(model):
        positions = jnp.broadcast_to(cache.index + jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, new = model(model.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens), cache=cache)
        return model.logits(hidden), new

    return LanguageModel(CONFIG).apply({"params": variables["params"]["language"]}, method=run)


def decode(variables, tokens, cache):
    """Decodes greedily, as `inference/generate.py` does."""

    def body(state):
        index, tokens, cache = state
        logits, cache = step(variables, tokens, cache)
        return index + 1, jnp.argmax(logits, axis=-1), cache

    return jax.lax.while_loop(lambda state: state[0] < 8, body, (0, tokens, cache))


def start(stacked, unstacked: bool):
    """Returns variables and an empty cache in one of the two forms."""
    cache = empty_cache(CONFIG, ROWS, SLOTS)
    return (with_layers(stacked, unstack_layers(stacked)), cache.unstack()) if unstacked else (stacked, cache)


def test_the_devices_of_the_weights_stay_known(stacked):
    """A run scores its weights and then saves them, for which Orbax asks for their device."""
    device = jax.devices()[0]
    placed = jax.device_put(stacked, NamedSharding(Mesh([device], ("data",)), PartitionSpec()))
    unstack_layers(placed)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(placed))


def test_weights_of_a_layer_are_views(stacked):
    layers = unstack_layers(stacked)
    assert len(layers) == CONFIG.num_layers
    kernel = stacked["params"]["language"]["layers"]["mlp"]["up"]["kernel"]
    for index, layer in enumerate(layers):
        view = layer["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(view, kernel[index])
        assert view.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer() + index * view.nbytes, "a copy"


def test_weights_on_a_mesh_stay_stacked(stacked):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    assert unstack_layers(jax.device_put(stacked, NamedSharding(mesh, PartitionSpec()))) is None


def test_scores_and_cache_are_those_of_stacked_weights(stacked):
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, PROMPT))
    results = []
    for unstacked in (False, True):
        variables, cache = start(stacked, unstacked)
        first, cache = jax.jit(step)(variables, tokens, cache)
        second, cache = jax.jit(step)(variables, tokens[:, :1], cache)
        results.append((first, second, jnp.stack(tuple(cache.keys)), jnp.stack(tuple(cache.values))))
    for ours, reference in zip(*results, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unstacked", [False, True])
def test_a_decoding_step_does_not_copy_the_cache(stacked, unstacked):
    variables, cache = start(stacked, unstacked)
    text = jax.jit(decode).lower(variables, jnp.zeros((ROWS, 1), int), cache).compile().as_text()
    # Before the loop, the caller's cache is copied once. In its body, nothing is copied or transposed.
    body = text[: text.index("\nENTRY ")]
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves((cache.keys, cache.values))}
    copies = re.findall(rf"f32\[(?:{'|'.join(shapes)})\]\S* (?:copy|transpose|broadcast)\(", body)
    assert not copies
