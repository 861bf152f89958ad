"""The ovis rule against tables worked by hand, and against a second writing of the rule."""

import random

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles


# width, height, tile side, most tiles -> (rows, cols). The reason stands beside each.
@pytest.mark.parametrize(
    "width, height, side, max_tiles, grid",
    [
        (384, 384, 384, 9, (1, 1)),  # exactly one tile, coverage 1
        (100, 60, 384, 9, (1, 1)),  # small images are not shrunk: coverage 1
        (96, 101, 96, 9, (1, 1)),  # (96 / 101)^2 = 0.903 > 0.9
        (96, 102, 96, 9, (2, 1)),  # (96 / 102)^2 = 0.886; two rows of 96 x 51 cover everything, two columns 0.886
        (102, 96, 96, 9, (1, 2)),  # the same, lying
        (96, 180, 96, 9, (2, 1)),
        (84, 192, 96, 9, (2, 1)),
        (200, 200, 96, 9, (2, 2)),  # (96 / 100)^2 = 0.92; three in a row only 96 * 46 * 3 / 40000 = 0.33
        (202, 202, 96, 9, (2, 2)),  # (96 / 101)^2 = 0.903
        (203, 203, 96, 9, (3, 3)),  # two by two 0.89, three by two 0.894 (cells 101 and 102 wide): only nine cover it
        (1000, 1400, 384, 9, (3, 3)),  # nothing covers 0.9: nine tiles keep the most
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
    """The last row and column take what is left; the long side of every picture is S; the thumbnail comes first."""
    plan = plan_tiles(1000, 1400, TilingConfig(tile_size=384))
    assert plan.boxes[0] == (0, 0, 1000, 1400)
    assert plan.boxes[1] == (0, 0, 333, 466)
    assert plan.boxes[3] == (666, 0, 1000, 466)
    assert plan.boxes[9] == (666, 932, 1000, 1400)
    assert plan.sizes[0] == (384, 274)  # int(1000 / 1400 * 384)
    assert plan.sizes[1] == (384, 274)  # int(333 / 466 * 384)
    # enlarged too: 84 x 51 becomes 96 wide
    assert plan_tiles(84, 102, TilingConfig(tile_size=96, thumbnail=False)).sizes == ((58, 96), (58, 96))


def _grid_as_published(width, height, side, max_tiles):
    """The rule written a second time, the long way round."""

    def cells(rows, cols):
        xs = [col * (width // cols) for col in range(cols)] + [width]
        ys = [row * (height // rows) for row in range(rows)] + [height]
        return [(xs[c + 1] - xs[c], ys[r + 1] - ys[r]) for r in range(rows) for c in range(cols)]

    def covered(w, h):
        w, h = max(w, h), min(w, h)
        if w > side:
            h, w = h / w * side, side
        return w * h

    everything = []
    for rows in range(1, max_tiles + 1):
        for cols in range(1, max_tiles + 1):
            if rows * cols <= max_tiles:
                area = 0.0
                for cell in cells(rows, cols):  # not sum(): Python 3.12 compensates it, and exact ties fall otherwise
                    area += covered(*cell)
                everything.append(((rows, cols), area / (width * height)))
    good = [entry for entry in everything if entry[1] > 0.9]
    if good:
        return sorted(good, key=lambda e: (e[0][0] * e[0][1], -e[1]))[0][0]
    return sorted(everything, key=lambda e: (-e[1], e[0][0] * e[0][1]))[0][0]


def test_grid_matches_second_writing():
    rng = random.Random(0)
    for _ in range(3000):
        longest = rng.choice([12, 200, 5000])
        width, height = rng.randint(1, longest), rng.randint(1, longest)
        side, max_tiles = rng.choice([96, 384, 448]), rng.choice([1, 4, 9])
        plan = plan_tiles(width, height, TilingConfig(tile_size=side, max_tiles=max_tiles))
        assert plan.grid == _grid_as_published(width, height, side, max_tiles), (width, height, side, max_tiles)
        cells = np.asarray(plan.boxes[plan.has_thumbnail :])
        areas = (cells[:, 2:] - cells[:, :2]).prod(axis=1)
        assert (areas > 0).all() and areas.sum() == width * height
        assert all(max(size) == side and min(size) >= 1 for size in plan.sizes)


def test_cut_tiles_places_the_picture_top_left():
    page = np.zeros((180, 96, 3), np.uint8)
    page[:90] = (10, 20, 30)
    page[90:] = (200, 210, 220)
    plan = plan_tiles(96, 180, TilingConfig(tile_size=96, thumbnail=False))
    tiles, valid_hw = cut_tiles(PIL.Image.fromarray(page), plan, 96)
    assert tiles.shape == (2, 96, 96, 3) and tiles.dtype == np.uint8 and valid_hw.dtype == np.int32
    np.testing.assert_array_equal(valid_hw, [[90, 96], [90, 96]])
    # Cells of one colour stay of one colour to their edge: nothing leaks across the cut.
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
    """A white dot drawn on a page is found in the tiles where map_points says."""
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
        assert tile >= int(plan.has_thumbnail)
        assert tiles[tile, min(int(y_tile), 63), min(int(x_tile), 63)].max() > 60


def test_wrong_config():
    with pytest.raises(ValueError, match="rule"):
        TilingConfig(rule="internvl")
    with pytest.raises(ValueError, match="0 x 5"):
        plan_tiles(0, 5, TilingConfig())
