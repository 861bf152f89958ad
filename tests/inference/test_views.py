"""Views: evenly over a patch, never far from where the page is, and what is in the frame moved with it."""

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data.tiling import TilingConfig, plan_tiles
from alignvlm_jax.inference import views

RULES = ("ovis", "internvl", "anyres_max_9")


def plan_of(width: int, height: int, rule: str = "ovis"):
    return plan_tiles(width, height, TilingConfig(rule=rule, tile_size=80, max_tiles=4, grid_side=2))


def test_views_lie_evenly_over_a_patch():
    plan = plan_of(80, 160)  # cut into two tiles, pixel for pixel
    assert views.offsets(1, plan, 8).tolist() == [[0, 0]]
    assert views.offsets(2, plan, 8).tolist() == [[-2, 0], [2, 0]]
    assert views.offsets(4, plan, 8).tolist() == [[-2, -2], [2, -2], [-2, 2], [2, 2]]
    assert views.offsets(6, plan, 12).tolist() == [[-4, -3], [0, -3], [4, -3], [-4, 3], [0, 3], [4, 3]]
    assert views.offsets(5, plan, 20).tolist() == [[-8, 0], [-4, 0], [0, 0], [4, 0], [8, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_offsets_are_in_pixels_of_the_image(rule):
    # Ten times as large, cut into the same tiles: a patch has ten times as many pixels of the image.
    small, large = plan_of(80, 160, rule), plan_of(800, 1600, rule)
    for number in (2, 3, 4, 9):
        np.testing.assert_array_equal(views.offsets(number, large, 24), 10 * views.offsets(number, small, 24))


@pytest.mark.parametrize("number", range(1, 13))
def test_no_view_is_further_than_half_a_patch(number):
    found = views.offsets(number, plan_of(800, 1600), 8)
    assert found.shape == (number, 2) and len(np.unique(found, axis=0)) == number
    assert np.abs(found).max() <= 40 and np.abs(found.mean(axis=0)).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_moved_image(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3) if mode == "RGB" else (6, 5)).astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    found = views.moved(image, 2, -1)
    assert found.mode == mode and found.size == image.size
    found = np.asarray(found)
    np.testing.assert_array_equal(found[:5, 2:], pixels[1:, :3])
    np.testing.assert_array_equal(found[:5, 0], pixels[1:, 0])  # the left edge, repeated
    np.testing.assert_array_equal(found[5], found[4])  # and the bottom one
    np.testing.assert_array_equal(views.moved(image, 0, 0), pixels)
