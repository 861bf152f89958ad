"""Tests of views: shifts spread evenly over a patch, their limits, and shifted images."""

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data.tiling import TilingConfig, plan_tiles
from alignvlm_jax.inference import views

RULES = ("ovis", "internvl", "anyres_max_9")


def make_plan(width: int, height: int, rule: str = "ovis"):
    return plan_tiles(width, height, TilingConfig(rule=rule, tile_size=80, max_tiles=4, grid_side=2))


def test_views_are_spread_evenly_over_a_patch():
    plan = make_plan(80, 160)  # Two tiles, with one pixel of the image per pixel of a tile.
    assert views.offsets(1, plan, 8).tolist() == [[0, 0]]
    assert views.offsets(2, plan, 8).tolist() == [[-2, 0], [2, 0]]
    assert views.offsets(4, plan, 8).tolist() == [[-2, -2], [2, -2], [-2, 2], [2, 2]]
    assert views.offsets(6, plan, 12).tolist() == [[-4, -3], [0, -3], [4, -3], [-4, 3], [0, 3], [4, 3]]
    assert views.offsets(5, plan, 20).tolist() == [[-8, 0], [-4, 0], [0, 0], [4, 0], [8, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_offsets_are_in_pixels_of_the_image(rule):
    # The larger image is cut into the same tiles, so a patch covers ten times as many of its pixels per side.
    small, large = make_plan(80, 160, rule), make_plan(800, 1600, rule)
    for number in (2, 3, 4, 9):
        np.testing.assert_array_equal(views.offsets(number, large, 24), 10 * views.offsets(number, small, 24))


@pytest.mark.parametrize("number", range(1, 13))
def test_no_view_is_shifted_by_more_than_half_a_patch(number):
    result = views.offsets(number, make_plan(800, 1600), 8)
    assert result.shape == (number, 2) and len(np.unique(result, axis=0)) == number
    assert np.abs(result).max() <= 40 and np.abs(result.mean(axis=0)).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_shifted_image(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3) if mode == "RGB" else (6, 5)).astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    result = views.shift(image, 2, -1)
    assert result.mode == mode and result.size == image.size
    result = np.asarray(result)
    np.testing.assert_array_equal(result[:5, 2:], pixels[1:, :3])
    np.testing.assert_array_equal(result[:5, 0], pixels[1:, 0])  # The left edge is repeated,
    np.testing.assert_array_equal(result[5], result[4])  # and so is the bottom one.
    np.testing.assert_array_equal(views.shift(image, 0, 0), pixels)
