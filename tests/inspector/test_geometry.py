"""The rectangle of each patch, checked on pages whose pixel values encode their position."""

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data.resampling import resample
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.inspector import geometry

SIDE, PATCH = 64, 8
CONFIGS = {
    "ovis": TilingConfig("ovis", SIDE),
    "internvl": TilingConfig("internvl", SIDE),
    "anyres": TilingConfig("anyres_max_9", SIDE, max_tiles=4, grid_side=3),
}


def position_image(width: int, height: int) -> PIL.Image.Image:
    """Returns an image whose red channel encodes the column and whose green channel encodes the row.

    Blue is 255 everywhere, to distinguish the page from black borders.
    """
    pixels = np.full((height, width, 3), 255.0)
    pixels[..., 0] = (np.arange(width) + 0.5) / width * 255
    pixels[..., 1] = ((np.arange(height) + 0.5) / height * 255)[:, None]
    return PIL.Image.fromarray(np.round(pixels).astype(np.uint8))


@pytest.mark.parametrize("rule", CONFIGS)
@pytest.mark.parametrize("size", [(64, 64), (150, 100), (100, 230), (333, 61)])
def test_rectangles_match_the_pixels_of_the_patches(rule, size):
    config, (width, height) = CONFIGS[rule], size
    plan = plan_tiles(width, height, config)
    tiles, valid_hw = cut_tiles(position_image(width, height), plan, SIDE)
    patches = geometry.tile_patches(plan, PATCH, SIDE)
    assert len(patches) == plan.num_tiles
    for tile, (tall, wide), pixels in zip(patches, valid_hw, tiles, strict=True):
        assert len(tile.xs) == len(tile.ys) == SIDE // PATCH + 1
        for row, column in np.ndindex(SIDE // PATCH, SIDE // PATCH):
            cut = pixels[row * PATCH : min((row + 1) * PATCH, tall), column * PATCH : min((column + 1) * PATCH, wide)]
            on_page = cut[cut[..., 2] > 250] if cut.size else cut.reshape(-1, 3)  # without padding and black border
            if not len(on_page):
                assert not tile.on_page[row, column] or min(tile.xs[column + 1] - tile.xs[column], 1) < 1
                continue
            assert tile.on_page[row, column]
            center = (tile.xs[column] + tile.xs[column + 1]) / 2, (tile.ys[row] + tile.ys[row + 1]) / 2
            # The mean position of the patch's pixels on the page. Resampling may shift it by half a tile pixel.
            measured = on_page[:, 0].mean() / 255 * width, on_page[:, 1].mean() / 255 * height
            pixel = max((tile.box[2] - tile.box[0]) / wide, (tile.box[3] - tile.box[1]) / tall)
            tolerance = 0.75 * pixel + 0.01 * max(size)
            np.testing.assert_allclose(measured, center, atol=tolerance)


@pytest.mark.parametrize("rule", CONFIGS)
def test_each_layer_covers_the_page_once(rule):
    plan = plan_tiles(150, 100, CONFIGS[rule])
    patches = geometry.tile_patches(plan, PATCH, SIDE)
    cells, *rest = geometry.layers(plan)
    assert len(cells.tiles) == plan.grid[0] * plan.grid[1] > 1
    assert [layer.tiles for layer in rest] == [(plan.thumbnail,)]
    for layer in (cells, *rest):
        area = sum(np.sum(np.diff(patches[tile].xs)) * np.sum(np.diff(patches[tile].ys)) for tile in layer.tiles)
        np.testing.assert_allclose(area, 150 * 100)


def test_pixels_beyond_the_last_whole_patch_are_not_covered():
    plan = plan_tiles(38, 38, TilingConfig("ovis", 38))
    (tile,) = geometry.tile_patches(plan, 9, 38)
    np.testing.assert_allclose(tile.xs, [0, 9, 18, 27, 36])


def test_border_patches_that_anyres_removes_are_unused():
    config = CONFIGS["anyres"]
    plan = plan_tiles(180, 20, config)  # Three cells in a row, mostly black border.
    resampling = resample(plan, config, (SIDE // PATCH, SIDE // PATCH))
    unused = geometry.unused_patches(plan, (SIDE // PATCH) ** 2, resampling)
    on_page = np.stack([tile.on_page.reshape(-1) for tile in geometry.tile_patches(plan, PATCH, SIDE)])
    cells = [tile for tile in range(plan.num_tiles) if tile != plan.thumbnail]
    assert not unused[plan.thumbnail].any() and unused[cells].any()
    # The rule rounds: it may remove a row that shows a sliver of the page, and keep at most one row beyond the page.
    assert unused[cells][~on_page[cells]].mean() > 0.6 and not unused[cells][on_page[cells]].all()
    assert not geometry.unused_patches(plan, 64, None).any()
