"""The three rules against hand-worked tables, and against transformers' code for InternVL and LLaVA-OneVision.

transformers' Ovis2 processor transposes the grid, so it is no reference; that rule is implemented a second time here.
"""

import random

import numpy as np
import PIL.Image
import pytest
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles


# width, height, tile side, max_tiles -> (rows, cols), with the reason.
@pytest.mark.parametrize(
    "width, height, side, max_tiles, grid",
    [
        (384, 384, 384, 9, (1, 1)),  # exactly one tile, coverage 1
        (100, 60, 384, 9, (1, 1)),  # small images are not shrunk: coverage 1
        (96, 101, 96, 9, (1, 1)),  # (96 / 101)^2 = 0.903 > 0.9
        (96, 102, 96, 9, (2, 1)),  # (96 / 102)^2 = 0.886; two rows of 96 x 51 cover everything, two columns 0.886
        (102, 96, 96, 9, (1, 2)),  # the same in landscape
        (96, 180, 96, 9, (2, 1)),
        (84, 192, 96, 9, (2, 1)),
        (200, 200, 96, 9, (2, 2)),  # (96 / 100)^2 = 0.92; three in a row only 96 * 46 * 3 / 40000 = 0.33
        (202, 202, 96, 9, (2, 2)),  # (96 / 101)^2 = 0.903
        (203, 203, 96, 9, (3, 3)),  # two by two 0.89, three by two 0.894 (cells 101 and 102 wide): only nine cover it
        (1000, 1400, 384, 9, (3, 3)),  # no grid covers 0.9: nine tiles keep the most
        (1000, 1400, 384, 4, (2, 2)),
        (1, 10000, 384, 9, (9, 1)),
        (1, 1, 384, 9, (1, 1)),
        (5, 3, 384, 9, (1, 1)),
    ],
)
def test_grid(width, height, side, max_tiles, grid):
    plan = plan_tiles(width, height, TilingConfig(tile_size=side, max_tiles=max_tiles))
    assert plan.grid == grid
    assert plan.num_tiles == grid[0] * grid[1] + (grid != (1, 1))
    assert plan.num_tiles <= TilingConfig(tile_size=side, max_tiles=max_tiles).max_tiles_per_image


def test_boxes_and_sizes():
    """The last row and column take the remainder, the long side of every tile is S, and the thumbnail comes first."""
    plan = plan_tiles(1000, 1400, TilingConfig(tile_size=384))
    assert plan.boxes[0] == (0, 0, 1000, 1400)
    assert plan.boxes[1] == (0, 0, 333, 466)
    assert plan.boxes[3] == (666, 0, 1000, 466)
    assert plan.boxes[9] == (666, 932, 1000, 1400)
    assert plan.sizes[0] == (384, 274)  # int(1000 / 1400 * 384)
    assert plan.sizes[1] == (384, 274)  # int(333 / 466 * 384)
    # Cells are also enlarged: 84 x 51 becomes 96 wide.
    assert plan_tiles(84, 102, TilingConfig(tile_size=96, thumbnail=False)).sizes == ((58, 96), (58, 96))


def _grid_as_published(width, height, side, max_tiles):
    """Returns the grid of the rule ovis, by a second, longer implementation."""

    def cells(rows, cols):
        xs = [col * (width // cols) for col in range(cols)] + [width]
        ys = [row * (height // rows) for row in range(rows)] + [height]
        return [(xs[c + 1] - xs[c], ys[r + 1] - ys[r]) for r in range(rows) for c in range(cols)]

    def covered(w, h):
        w, h = max(w, h), min(w, h)
        if w > side:
            h, w = h / w * side, side
        return w * h

    grids = []
    for rows in range(1, max_tiles + 1):
        for cols in range(1, max_tiles + 1):
            if rows * cols <= max_tiles:
                area = 0.0
                for cell in cells(rows, cols):  # not sum(): Python 3.12 compensates it, which breaks exact ties
                    area += covered(*cell)
                grids.append(((rows, cols), area / (width * height)))
    good = [entry for entry in grids if entry[1] > 0.9]
    if good:
        return sorted(good, key=lambda e: (e[0][0] * e[0][1], -e[1]))[0][0]
    return sorted(grids, key=lambda e: (-e[1], e[0][0] * e[0][1]))[0][0]


def test_grid_matches_second_implementation():
    rng = random.Random(0)
    for _ in range(3000):
        longest = rng.choice([12, 200, 5000])
        width, height = rng.randint(1, longest), rng.randint(1, longest)
        side, max_tiles = rng.choice([96, 384, 448]), rng.choice([1, 4, 9])
        plan = plan_tiles(width, height, TilingConfig(tile_size=side, max_tiles=max_tiles))
        assert plan.grid == _grid_as_published(width, height, side, max_tiles), (width, height, side, max_tiles)
        cells = np.asarray(plan.boxes[plan.first_cell :])
        areas = (cells[:, 2:] - cells[:, :2]).prod(axis=1)
        assert (areas > 0).all() and areas.sum() == width * height
        assert all(max(size) == side and min(size) >= 1 for size in plan.sizes)


def test_cut_tiles_places_the_image_top_left():
    page = np.zeros((180, 96, 3), np.uint8)
    page[:90] = (10, 20, 30)
    page[90:] = (200, 210, 220)
    plan = plan_tiles(96, 180, TilingConfig(tile_size=96, thumbnail=False))
    tiles, valid_hw = cut_tiles(PIL.Image.fromarray(page), plan, 96)
    assert tiles.shape == (2, 96, 96, 3) and tiles.dtype == np.uint8 and valid_hw.dtype == np.int32
    np.testing.assert_array_equal(valid_hw, [[90, 96], [90, 96]])
    # Cells of one color keep this color up to their edge: nothing leaks across the cut.
    assert (tiles[0, :90] == (10, 20, 30)).all() and (tiles[1, :90] == (200, 210, 220)).all()
    assert (tiles[:, 90:] == 0).all()


def test_cut_tiles_does_not_leak_across_cells_when_resizing():
    page = np.zeros((192, 84, 3), np.uint8)
    page[100:] = 255
    plan = plan_tiles(84, 200, TilingConfig(tile_size=96, thumbnail=False))
    tiles, valid_hw = cut_tiles(PIL.Image.fromarray(np.pad(page, ((0, 8), (0, 0), (0, 0)), mode="edge")), plan, 96)
    (h0, w0), (h1, w1) = valid_hw
    assert (tiles[0, :h0, :w0] == 0).all() and (tiles[1, :h1, :w1] == 255).all()


def test_map_points_by_hand():
    plan = plan_tiles(96, 180, TilingConfig(tile_size=96, thumbnail=False))
    tile, xy = plan.map_points(np.array([[10, 100], [95, 89.5], [10, 90], [-3, 200]]))
    np.testing.assert_array_equal(tile, [1, 0, 1, 1])
    np.testing.assert_allclose(xy, [[10, 10], [95, 89.5], [10, 0], [-3, 110]])


@pytest.mark.parametrize("thumbnail", [False, True])
def test_map_points_finds_the_pixel(thumbnail):
    """A white dot on a page is found in the tiles at the position that map_points returns."""
    config = TilingConfig(tile_size=64, thumbnail=thumbnail)
    rng = np.random.default_rng(0)
    for _ in range(30):
        width, height = rng.integers(60, 190, 2)
        x, y = rng.integers(3, width - 3), rng.integers(3, height - 3)
        page = np.zeros((height, width, 3), np.uint8)
        page[y - 1 : y + 2, x - 1 : x + 2] = 255
        plan = plan_tiles(int(width), int(height), config)
        tiles, _ = cut_tiles(PIL.Image.fromarray(page), plan, 64)
        (tile,), ((x_tile, y_tile),) = plan.map_points([[x + 0.5, y + 0.5]])
        assert tile >= plan.first_cell
        assert tiles[tile, min(int(y_tile), 63), min(int(x_tile), 63)].max() > 60


# width, height, tile side, max_tiles -> (rows, cols).
@pytest.mark.parametrize(
    "width, height, side, max_tiles, grid",
    [
        (448, 448, 448, 12, (1, 1)),  # 2 x 2 ties, but needs more than 0.5 * 448^2 * 4 = 401,408 pixels
        (800, 800, 448, 9, (2, 2)),  # 640,000 are more; 3 x 3 would need 903,168
        (1000, 1000, 448, 9, (3, 3)),
        (1000, 1000, 448, 8, (2, 2)),
        (800, 600, 448, 9, (2, 3)),  # 4/3 is 1/6 from 3/2, 1/3 from 1
        (800, 600, 448, 12, (3, 4)),  # twelve tiles allow exactly 4/3
        (1280, 720, 448, 9, (2, 4)),  # 16/9 is nearest to 2; 921,600 pixels are more than 0.5 * 448^2 * 8 = 802,816
        (640, 360, 448, 9, (1, 2)),
        (1000, 1400, 448, 9, (3, 2)),  # 5/7 = 0.714: 2/3 is nearer than 1
        (1000, 1400, 448, 12, (4, 3)),
        (500, 400, 448, 9, (1, 1)),  # 5/4 is 1/4 from 1 and from 3/2: 200,000 pixels are not enough for six tiles
        (1000, 800, 448, 9, (2, 3)),  # 800,000 are: 0.5 * 448^2 * 6 = 602,112
        (1, 10000, 448, 9, (9, 1)),
        (10000, 1, 448, 9, (1, 9)),
        (1, 1, 448, 9, (1, 1)),
    ],
)
def test_internvl_grid(width, height, side, max_tiles, grid):
    config = TilingConfig("internvl", side, max_tiles)
    plan = plan_tiles(width, height, config)
    assert plan.grid == grid
    assert plan.num_tiles == grid[0] * grid[1] + (grid != (1, 1)) <= config.max_tiles_per_image
    assert plan.thumbnail == (None if grid == (1, 1) else plan.num_tiles - 1)


# width, height -> (rows, cols) of canvases with cells of 384 x 384, at most six by six.
@pytest.mark.parametrize(
    "width, height, grid",
    [
        (384, 384, (1, 1)),
        (100, 60, (1, 1)),  # fits on any canvas: the smallest
        (384, 385, (2, 1)),  # one cell would keep 383 x 384 = 147,072 of 147,840 pixels
        (800, 600, (2, 3)),  # 2 x 2 would keep 768 x 576 pixels; 1152 x 768 keeps all
        (1000, 1400, (4, 3)),
        (2304, 2304, (6, 6)),
        (3000, 4000, (6, 5)),  # it can keep at most 1728 x 2304, for which five columns are enough
        (4000, 3000, (5, 6)),
        (10, 10000, (6, 1)),  # 2 x 2304
        (1, 10000, (1, 1)),  # less than a pixel wide on any canvas: the smallest
    ],
)
def test_anyres_grid(width, height, grid):
    config = TilingConfig("anyres_max_9")
    plan = plan_tiles(width, height, config)
    assert plan.grid == grid
    assert plan.num_tiles == grid[0] * grid[1] + 1 <= config.max_tiles_per_image == 37
    assert plan.thumbnail == 0 and plan.first_cell == 1


def test_anyres_boxes():
    """800 x 600 on 1152 x 768: 768 / 600 = 1.28 fills the height, the width becomes 1024, a border of 64 each side."""
    plan = plan_tiles(800, 600, TilingConfig("anyres_max_9"))
    assert plan.canvas.size == (1024, 768) and plan.canvas.origin == (64, 0)
    assert plan.boxes[0] == (0, 0, 800, 600)
    assert plan.boxes[1] == (-50, 0, 250, 300)  # 64 / 1.28 = 50 beyond the page; 384 / 1.28 = 300
    assert plan.boxes[6] == (550, 300, 850, 600)


def _random_sizes(count, longest=(12, 200, 5000)):
    rng = random.Random(0)
    for _ in range(count):
        limit = rng.choice(longest)
        yield rng.randint(1, limit), rng.randint(1, limit)


def test_grids_match_transformers():
    for width, height in [*_random_sizes(2000), (500, 400), (1000, 800), (600, 400), (1250, 3000), (900, 900)]:
        for side, max_tiles in ((56, 9), (448, 12)):
            plan = plan_tiles(width, height, TilingConfig("internvl", side, max_tiles))
            assert plan.grid == get_optimal_tiled_canvas((height, width), (side, side), 1, max_tiles)[::-1]
        for side in (56, 384):
            plan = plan_tiles(width, height, TilingConfig("anyres_max_9", side))
            pinpoints = [(row * side, col * side) for row in range(1, 7) for col in range(1, 7)]
            height_width = select_best_resolution((height, width), pinpoints)
            assert plan.grid == tuple(pixels // side for pixels in height_width)


@pytest.mark.parametrize("size", [(56, 56), (200, 130), (130, 200), (500, 90), (41, 33), (3, 400), (1, 10000)], ids=str)
@pytest.mark.parametrize("rule", ["internvl", "anyres_max_9"])
def test_pixels_match_transformers(rule, size):
    """Every pixel of every tile is equal, in the same order."""
    page = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    common = {"size": {"height": 56, "width": 56}, "do_rescale": False, "do_normalize": False, "do_convert_rgb": True}
    if rule == "internvl":
        processor = GotOcr2ImageProcessorPil(crop_to_patches=True, max_patches=9, **common)
        expected = processor(page, return_tensors="np")["pixel_values"]
    else:
        pinpoints = [[row * 56, col * 56] for row in range(1, 7) for col in range(1, 7)]
        processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints, **common)
        expected = processor(page, return_tensors="np")["pixel_values"][0]
    tiles, valid_hw = cut_tiles(page, plan_tiles(*page.size, TilingConfig(rule, tile_size=56)), 56)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), expected)
    assert (valid_hw == 56).all()


@pytest.mark.parametrize("rule", ["internvl", "anyres_max_9"])
def test_map_points_finds_the_pixel_on_a_canvas(rule):
    config = TilingConfig(rule, tile_size=64)
    rng = np.random.default_rng(0)
    for _ in range(30):
        width, height = rng.integers(60, 190, 2)
        x, y = rng.integers(3, width - 3), rng.integers(3, height - 3)
        page = np.zeros((height, width, 3), np.uint8)
        page[y - 1 : y + 2, x - 1 : x + 2] = 255
        plan = plan_tiles(int(width), int(height), config)
        tiles, _ = cut_tiles(PIL.Image.fromarray(page), plan, 64)
        (tile,), ((x_tile, y_tile),) = plan.map_points([[x + 0.5, y + 0.5]])
        assert tile != plan.thumbnail
        assert tiles[tile, min(int(y_tile), 63), min(int(x_tile), 63)].max() > 60


def test_wrong_config():
    with pytest.raises(ValueError, match="rule: expected one of ovis, internvl, anyres_max_9, got 'anyres'"):
        TilingConfig(rule="anyres")
    with pytest.raises(ValueError, match="grid_side"):
        TilingConfig(grid_side=0)
    with pytest.raises(ValueError, match="0 x 5"):
        plan_tiles(0, 5, TilingConfig())


@pytest.mark.parametrize("rule", ["ovis", "internvl", "anyres_max_9"])
def test_gray_is_cut_like_its_rgb(rule):
    page = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (310, 190), np.uint8))
    plan = plan_tiles(*page.size, TilingConfig(rule, tile_size=56))
    for gray, color in zip(cut_tiles(page, plan, 56), cut_tiles(page.convert("RGB"), plan, 56), strict=True):
        np.testing.assert_array_equal(gray, color)
