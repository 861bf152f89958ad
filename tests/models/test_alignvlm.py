"""The complete model: no leaks between packed examples, cached decoding, and the sizes of its parts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from alignvlm_jax.models import connectors
from alignvlm_jax.models.alignvlm import (
    AlignVLM,
    AlignVLMConfig,
    example_batch,
    parameter_shapes,
    random_parameters,
    seed_connector,
    tokens_per_tile,
)
from alignvlm_jax.models.language import LanguageConfig, empty_cache
from alignvlm_jax.models.vision import VisionConfig, normalize_tiles

VISION = VisionConfig(image_size=12, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
LANGUAGE = LanguageConfig(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, rope_theta=100.0
)
CONFIG = AlignVLMConfig(VISION, connectors.AlignConfig(), LANGUAGE)
N = 9  # visual tokens per tile


def _random_parameters(config):
    # Compiled as one program, because operation by operation it takes ten times as long.
    return jax.jit(lambda: nn.unbox(random_parameters(config, jax.random.key(0))))()


@pytest.fixture(scope="module")
def params():
    scattered = _random_parameters(CONFIG)
    leaves, treedef = jax.tree.flatten(scattered)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Twice the usual spread, so that attention matters enough for a leak to show.
    return treedef.unflatten(
        [leaf * 2 + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def _example(rng, num_tiles, text_length):
    """Returns one example: a first token, visual tokens, then text, all of it with weight 1."""
    visual = num_tiles * N
    length = 1 + visual + text_length
    tokens = rng.integers(0, 30, length + 1)
    index = np.full(length, -1)
    index[1 : 1 + visual] = np.arange(visual)
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "loss_weights": (np.arange(length) >= visual).astype(np.float32),
        "visual_index": index,
        "tiles": rng.integers(0, 256, (num_tiles, 12, 12, 3)).astype(np.uint8),
        "tile_valid_hw": np.full((num_tiles, 2), 12),
    }


def _bin(examples, length, num_tiles):
    """Packs examples into one row by hand, in the format described in models/alignvlm.py."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    row["loss_weights"] = np.zeros(length, np.float32)
    row["visual_index"] = np.full(length, -1)
    row["tiles"] = np.zeros((num_tiles, 12, 12, 3), np.uint8)
    row["tile_valid_hw"] = np.zeros((num_tiles, 2), np.int32)
    start = tile = 0
    for number, example in enumerate(examples, start=1):
        span = slice(start, start + len(example["tokens"]))
        for name in ("tokens", "targets", "loss_weights"):
            row[name][span] = example[name]
        row["segment_ids"][span] = number
        row["positions"][span] = np.arange(len(example["tokens"]))
        index = example["visual_index"]
        row["visual_index"][span] = np.where(index >= 0, index + tile * N, -1)
        tiles = slice(tile, tile + len(example["tiles"]))
        row["tiles"][tiles], row["tile_valid_hw"][tiles] = example["tiles"], example["tile_valid_hw"]
        start, tile = span.stop, tiles.stop
    return jax.tree.map(lambda array: jnp.asarray(array)[None], row)


@jax.jit
def _loss(params, batch):
    output = AlignVLM(CONFIG).apply({"params": params}, batch, method="loss")
    return output.loss, output.weight


def _apply(method):
    """Returns a compiled method of the model, called with its variables first."""
    return jax.jit(functools.partial(AlignVLM(CONFIG).apply, method=method))


def test_an_examples_loss_and_gradient_are_the_same_alone_and_packed(params):
    rng = np.random.default_rng(0)
    examples = [_example(rng, 2, 7), _example(rng, 1, 4), _example(rng, 0, 9)]
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, b: _loss(p, b)[0]))
    alone = [value_and_grad(params, _bin([example], 64, 4)) for example in examples]
    # The loss is a weighted sum, so losses and gradients of the examples add up.
    packed, packed_gradient = value_and_grad(params, _bin(examples, 64, 4))
    np.testing.assert_allclose(packed, sum(loss for loss, _ in alone), rtol=1e-5)
    summed = jax.tree.map(lambda *gradients: sum(gradients), *[gradient for _, gradient in alone])
    for got, expected in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(summed), strict=True):
        assert np.linalg.norm(got - expected) <= 1e-4 * max(np.linalg.norm(expected), 1e-3)
    # The comparison can fail: with one segment for all examples, attention leaks and the loss changes.
    leaking = _bin(examples, 64, 4)
    leaking["segment_ids"] = jnp.minimum(leaking["segment_ids"], 1)
    assert abs(float(_loss(params, leaking)[0] - packed)) > 1e-2


def test_exchanging_tiles_changes_the_loss(params):
    """A model that ignored its tiles, or their order, would pass the other tests."""
    batch = _bin([_example(np.random.default_rng(0), 2, 7)], 32, 2)
    loss = _loss(params, batch)[0]
    swapped = {**batch, "tiles": batch["tiles"][:, ::-1]}
    assert abs(float(_loss(params, swapped)[0] - loss)) > 1e-3


def test_prefill_and_decoding_match_the_full_forward_pass(params):
    rng = np.random.default_rng(0)
    examples = [_example(rng, 2, 7), _example(rng, 1, 3)]  # Prompts of different lengths.
    continuation = rng.integers(0, 30, (2, 4))
    variables = {"params": params}
    prefill, decode_step, score = (_apply(method) for method in ("prefill", "decode_step", "__call__"))
    prompts = [_bin([example], 40, 2) for example in examples]
    prompts = jax.tree.map(lambda *rows: jnp.concatenate(rows), *prompts)
    logits, cache = prefill(variables, prompts, empty_cache(LANGUAGE, 2, 46))
    lengths = np.array([len(example["tokens"]) for example in examples])
    stepwise = [logits]
    for step in range(4):
        logits, cache = decode_step(variables, continuation[:, step], jnp.asarray(lengths + step), cache)
        stepwise.append(logits)
    for row, example in enumerate(examples):
        longer = dict(example)
        for name, more in (("tokens", continuation[row]), ("targets", [0] * 4), ("loss_weights", [0.0] * 4)):
            longer[name] = np.concatenate([example[name], more])
        longer["visual_index"] = np.concatenate([example["visual_index"], [-1] * 4])
        full = score(variables, _bin([longer], 46, 2)).logits[0]
        for step in range(5):
            np.testing.assert_allclose(stepwise[step][row], full[lengths[row] - 1 + step], rtol=1e-4, atol=1e-4)


def test_w2_starts_as_the_lm_head_and_is_a_parameter_of_its_own():
    for tied in (True, False):
        config = dataclasses.replace(CONFIG, language=dataclasses.replace(LANGUAGE, tie_word_embeddings=tied))
        params = _random_parameters(config)
        head = params["language"]["embedding" if tied else "lm_head"]
        np.testing.assert_array_equal(params["connector"]["w2"], head)
    fewer = dataclasses.replace(CONFIG, connector=connectors.AlignConfig(vocab_size=28))
    params = _random_parameters(fewer)
    np.testing.assert_array_equal(params["connector"]["w2"], params["language"]["embedding"][:28])
    mlp = dataclasses.replace(CONFIG, connector=connectors.MLPConfig())
    params = _random_parameters(mlp)
    assert seed_connector(mlp, params) is params


def test_padding_is_zero_after_normalization():
    tiles = jnp.full((1, 4, 4, 3), 255, jnp.uint8)
    pixels = normalize_tiles(tiles, jnp.array([[2, 3]]))
    assert np.all(pixels[0, :2, :3] == 1.0) and np.all(pixels[0, 2:] == 0.0) and np.all(pixels[0, :, 3:] == 0.0)


@pytest.mark.parametrize(
    ("connector", "count"),
    [
        (connectors.AlignConfig(), N),
        (connectors.MLPConfig(), N),
        (connectors.PerceiverConfig(num_latents=4, num_heads=2, num_kv_heads=1, head_dim=4), 4),
        (connectors.OvisConfig(num_words=8), N),
        (connectors.HReducerConfig(window=2), 6),
        (connectors.CAbstractorConfig(num_tokens=4, depth=1, hidden_size=8), 4),
    ],
)
def test_every_connector_fits_encoder_and_decoder(connector, count):
    config = AlignVLMConfig(VISION, connector, LANGUAGE)
    assert tokens_per_tile(config) == count
    batch = example_batch(config, rows=2, tiles=2, length=2 * count + 3)
    shapes = jax.eval_shape(lambda: AlignVLM(config).init_with_output(jax.random.key(0), batch))
    output, variables = shapes
    assert output.logits.shape == (2, 2 * count + 3, 30)
    assert set(variables["params"]) == {"vision", "connector", "language"}


def test_parameter_counts_match_transformers_at_the_papers_sizes():
    """Counts the parameters of So400m/14-384 and Llama-3.2-1B without allocating any."""
    ours = nn.unbox(parameter_shapes(AlignVLMConfig()))
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in ours.items()}
    with torch.device("meta"):
        siglip = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=1152,
                image_size=384,
                patch_size=14,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                vision_use_head=False,
            )
        )
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            )
        )
    assert counts["vision"] == sum(p.numel() for p in siglip.parameters())
    assert counts["language"] == sum(p.numel() for p in llama.parameters())
    # ALIGN has no counterpart in transformers: W1 and its bias, LN, W2, LN_V.
    w1, norm, w2, vocab_norm = 1152 * 2048 + 2048, 2 * 2048, 128256 * 2048, 2 * 128256
    assert counts["connector"] == w1 + norm + w2 + vocab_norm
