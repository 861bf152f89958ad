"""Visual tokens of anyres_max_9 and their gradients against LLaVA-OneVision's packing in transformers."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from alignvlm_jax.data.resampling import at_positions, resample_images
from alignvlm_jax.data.tiling import TilingConfig, plan_tiles
from alignvlm_jax.models import connectors
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, mix_visual, parameter_shapes, random_parameters
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig

VISION = VisionConfig(image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
LANGUAGE = LanguageConfig(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2, rope_theta=100.0
)
CONFIG = AlignVLMConfig(VISION, connectors.AlignConfig(), LANGUAGE, newline=True)
TILING = TilingConfig("anyres_max_9", tile_size=16, max_tiles=2)
# In turn: a page that is shrunk, a page of a single cell, and a page with a border.
PAGES = ((60, 40), (16, 16), (20, 70))
N = 16  # visual tokens per tile


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: nn.unbox(random_parameters(CONFIG, jax.random.key(0))))()


def _row():
    """Returns plans and token counts of three pages, and one bin with them, text around them, and two unused tiles."""
    rng = np.random.default_rng(0)
    plans = [plan_tiles(*page, TILING) for page in PAGES]
    resampling = resample_images(plans, TILING, (4, 4))
    lengths = [len(resample_images([plan], TILING, (4, 4)).sources) for plan in plans]
    index, start = [np.full(2, -1)], 0
    for length in lengths:
        index += [np.arange(start, start + length), np.full(3, -1)]
        start += length
    index = np.concatenate(index)
    num_tiles = sum(plan.num_tiles for plan in plans)
    sources, weights = at_positions(index, resampling)
    return (
        plans,
        lengths,
        {
            "tokens": rng.integers(0, 30, (1, len(index))),
            "targets": rng.integers(0, 30, (1, len(index))),
            "loss_weights": (index < 0)[None].astype(np.float32),
            "segment_ids": np.ones((1, len(index)), np.int32),
            "positions": np.arange(len(index))[None],
            "visual_index": index[None],
            "visual_sources": sources[None],
            "visual_weights": weights[None],
            "tiles": rng.integers(0, 256, (1, num_tiles + 2, 16, 16, 3)).astype(np.uint8),
            "tile_valid_hw": np.concatenate([np.full((1, num_tiles, 2), 16), np.zeros((1, 2, 2))], axis=1).astype(int),
        },
    )


def _pack_with_transformers(plans, visual, newline):
    """Returns the packed tokens of all pages, from the tokens of their tiles."""
    # `pack_image_features` only reads the config of its model.
    pinpoints = [[row * 16, col * 16] for row in range(1, 7) for col in range(1, 7)]
    vision = types.SimpleNamespace(image_size=16, patch_size=4)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    features = visual.split([plan.num_tiles * N for plan in plans])
    features = [part.unflatten(0, (plan.num_tiles, N)) for part, plan in zip(features, plans, strict=True)]
    sizes = torch.tensor([plan.image_size[::-1] for plan in plans])
    packed, _ = LlavaOnevisionModel.pack_image_features(model, features, sizes, newline, "anyres_max_2")
    return torch.cat(packed)


def test_decoder_inputs_and_gradients_match_transformers(params):
    plans, lengths, row = _row()
    num_used = sum(plan.num_tiles for plan in plans) * N
    is_visual = row["visual_index"][0] >= 0
    encode, merge = (
        jax.jit(functools.partial(AlignVLM(CONFIG).apply, method=method)) for method in ("encode_images", "merge")
    )
    visual, _ = encode({"params": params}, row["tiles"], row["tile_valid_hw"])
    inputs = merge({"params": params}, row, visual)

    theirs_visual = torch.tensor(np.asarray(visual[0, :num_used]), dtype=torch.float64, requires_grad=True)
    theirs_newline = torch.tensor(np.asarray(params["connector"]["newline"]), dtype=torch.float64, requires_grad=True)
    theirs = _pack_with_transformers(plans, theirs_visual, theirs_newline)
    assert len(theirs) == sum(lengths) == is_visual.sum()
    np.testing.assert_allclose(inputs[0, is_visual], theirs.detach(), atol=1e-6)
    np.testing.assert_array_equal(inputs[0, ~is_visual], params["language"]["embedding"][row["tokens"][0, ~is_visual]])

    cotangent = np.random.default_rng(1).standard_normal(theirs.shape)
    full_cotangent = np.zeros(inputs.shape, np.float32)
    full_cotangent[0, is_visual] = cotangent
    _, pull_back = jax.vjp(
        lambda visual, newline: mix_visual(visual, newline, row["visual_sources"], row["visual_weights"]),
        visual,
        params["connector"]["newline"],
    )
    dvisual, dnewline = pull_back(jnp.asarray(full_cotangent))
    expected = torch.autograd.grad(theirs, (theirs_visual, theirs_newline), torch.tensor(cotangent))
    np.testing.assert_allclose(dvisual[0, :num_used], expected[0], atol=1e-5)
    np.testing.assert_allclose(dnewline, expected[1], atol=1e-5)
    assert not np.any(dvisual[0, num_used:]), "padding gets no gradient"


def test_the_loss_has_gradients_for_encoder_and_newline(params):
    _, _, row = _row()

    def loss(params):
        return AlignVLM(CONFIG).apply({"params": params}, row, method="loss").loss

    gradients = jax.jit(jax.grad(loss))(params)
    for leaf in (gradients["connector"]["newline"], gradients["vision"]["patch_embedding"]["kernel"]):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)


def test_without_newlines_there_is_no_newline_weight(params):
    config = dataclasses.replace(CONFIG, newline=False)
    plain = parameter_shapes(config)
    assert set(params["connector"]) - set(plain["connector"]) == {"newline"}
    assert set(params) == set(plain)


@pytest.mark.parametrize("name", ["mlp", "ovis", "h_reducer", "perceiver", "c_abstractor"])
def test_every_connector_may_have_a_newline(name):
    config = dataclasses.replace(CONFIG, connector=connectors.connector_named(name).config())
    shapes = nn.unbox(parameter_shapes(config))
    assert shapes["connector"]["newline"].shape == (16,)
