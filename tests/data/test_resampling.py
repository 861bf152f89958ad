"""Visual tokens of anyres_max_9, compared with LLaVA-OneVision's packing in transformers: values and gradients."""

import types

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from alignvlm_jax.data.resampling import max_visual_tokens, num_visual_tokens, resample
from alignvlm_jax.data.tiling import TilingConfig, plan_tiles


def _gathered(plan, config, grid, features, newline):
    """Returns the tokens that sources and weights describe, in torch, which gives a gradient."""
    sources, weights = resample(plan, config, grid)
    rows = torch.cat([features.flatten(0, 1), newline[None]])  # -1 is the last
    return (rows[torch.from_numpy(sources).long()] * torch.from_numpy(weights)[..., None]).sum(1)


def _packed_by_transformers(plan, side, tokens, max_tiles, features, newline):
    """Runs `pack_image_features` for a vision tower with tiles of `side` pixels and `tokens` squared tokens."""
    pinpoints = [[row * side, col * side] for row in range(1, 7) for col in range(1, 7)]
    vision = types.SimpleNamespace(image_size=side, patch_size=side // tokens)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    size = torch.tensor([plan.image_size[::-1]])
    packed, lengths = LlavaOnevisionModel.pack_image_features(
        model, [features], size, newline, vision_aspect_ratio=f"anyres_max_{max_tiles}"
    )
    assert lengths.tolist() == [len(packed[0])]
    return packed[0]


# One page of each kind: one cell, wide, tall, exact fit, padded above and below, odd and even borders, reduced.
_SIZES = [
    (56, 56),
    (20, 13),
    (56, 112),
    (300, 100),
    (90, 130),
    (101, 333),
    (336, 336),
    (335, 300),
    (1000, 1400),
    (14, 50),
]


@pytest.mark.parametrize("tokens", [4, 7])
@pytest.mark.parametrize("max_tiles", [2, 9])
@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_tokens_and_gradients_match_transformers(size, tokens, max_tiles):
    config = TilingConfig("anyres_max_9", tile_size=56, max_tiles=max_tiles)
    plan, grid = plan_tiles(*size, config), (tokens, tokens)
    torch.manual_seed(0)
    features = torch.randn(plan.num_tiles, tokens * tokens, 5, dtype=torch.float64, requires_grad=True)
    newline = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ours = _gathered(plan, config, grid, features, newline)
    theirs = _packed_by_transformers(plan, 56, tokens, max_tiles, features, newline)
    assert ours.shape == theirs.shape
    assert len(ours) == num_visual_tokens(plan, config, grid) <= max_visual_tokens(config, grid)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    cotangent = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, (features, newline), cotangent)
    for mine, yours in zip(torch.autograd.grad(ours, (features, newline), cotangent), expected, strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-6, rtol=0)


def test_the_example_of_the_docstring():
    config = TilingConfig("anyres_max_9", tile_size=4, thumbnail=False)
    sources, weights = resample(plan_tiles(8, 4, config), config, (2, 2))
    np.testing.assert_array_equal(sources[:, 0], [0, 1, 4, 5, -1, 2, 3, 6, 7, -1])
    np.testing.assert_array_equal(weights, np.tile([1.0, 0.0, 0.0, 0.0], (10, 1)))


# S = 384, 27 x 27 tokens per tile: the paper's encoder. Worked by hand.
@pytest.mark.parametrize(
    "width, height, tokens",
    [
        (384, 384, 729 + 27 * 28),  # one cell and the thumbnail: no border, a newline for each of 27 rows
        # 3 columns, 2 rows: 81 x 54 tokens. 600 * 81 / 800 = 60.75 rows would be needed, there are 54; so 800 wide
        # needs 800 * 54 / 600 = 72 of 81 columns: borders of 4, 73 columns remain.
        (800, 600, 729 + 54 * 74),
        # 3 columns, 4 rows: 81 x 108. 1000 * 108 / 1400 = 77.1: borders of 2, 77 columns. 108 * 77 = 8316 tokens are
        # too many by sqrt(8316 / 6561) = 1.126 > 1.1: 108 / 1.126 = 95.9, 77 / 1.126 = 68.4.
        (1000, 1400, 729 + 95 * 69),
        # 6 x 6: 162 x 162, reduced by exactly 2.
        (2304, 2304, 729 + 81 * 82),
        (1, 10000, 729 + 27 * 2),  # one cell; 1 of 27 columns remains
    ],
)
def test_number_of_tokens(width, height, tokens):
    config = TilingConfig("anyres_max_9")
    plan = plan_tiles(width, height, config)
    assert num_visual_tokens(plan, config, (27, 27)) == tokens
    sources, weights = resample(plan, config, (27, 27))
    assert sources.shape == weights.shape == (tokens, 4)
    assert sources.max() < plan.num_tiles * 729
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_a_sliver_keeps_a_column():
    """The original would leave only newlines: int(7 * 4 / 50) = 0 of an even number of columns."""
    config = TilingConfig("anyres_max_9", tile_size=56, thumbnail=False)
    sources, _ = resample(plan_tiles(7, 50, config), config, (4, 4))
    np.testing.assert_array_equal(sources[:, 0], [1, 2, -1, 5, 6, -1, 9, 10, -1, 13, 14, -1])


def test_other_rules_take_every_token():
    for rule in ("ovis", "internvl"):
        config = TilingConfig(rule, tile_size=32)
        plan = plan_tiles(100, 80, config)
        assert num_visual_tokens(plan, config, (4, 4)) == plan.num_tiles * 16
        assert max_visual_tokens(config, (4, 4)) == 10 * 16


def test_tokens_that_are_not_square():
    """H-Reducer merges four columns into one. The border is that of square tokens, in units four times as wide."""
    config = TilingConfig("anyres_max_9", tile_size=56, max_tiles=100)
    plan = plan_tiles(112, 40, config)  # one row of two cells; 40 of 56 rows of pixels show the image
    assert plan.grid == (1, 2)
    assert num_visual_tokens(plan, config, (8, 2)) == 16 + 6 * (2 * 2 + 1)  # int(40 / 112 * 16) = 5: borders of 1


def test_no_image_exceeds_the_bound():
    rng = np.random.default_rng(0)
    for max_tiles, side in ((9, 6), (4, 3), (1, 2)):
        config = TilingConfig("anyres_max_9", tile_size=32, max_tiles=max_tiles, grid_side=side)
        bound = max_visual_tokens(config, (8, 8))
        for width, height in rng.integers(1, 400, (500, 2)).tolist():
            plan = plan_tiles(width, height, config)
            assert plan.num_tiles <= config.max_tiles_per_image
            assert 64 < num_visual_tokens(plan, config, (8, 8)) <= bound
