"""Cut a page into tiles by a predefined grid, and know where every pixel of the page went.

Axis letters: M tiles, S tile side in pixels, P points. Boxes are (left, top, right, bottom) in pixels of the page.

The rule is the one of Ovis ("coverage ratio"), which the paper uses:

* every grid of rows x cols with rows * cols <= max_tiles is tried; a cell is h // rows by w // cols pixels and the last
  row and column take what is left over;
* a cell covers the area it has after its long side is shrunk (never enlarged) to S; the coverage of a grid is the sum
  over its cells, over the area of the image: the share of detail that survives;
* if any grid covers more than 0.9, the one with the fewest tiles wins (ties: the larger coverage); otherwise the
  largest coverage wins (ties: fewer tiles);
* every cell is resized, up or down, until its long side is S, keeping its aspect; with more than one cell the whole
  image comes first as a thumbnail.

Example, S = 96: a page 96 wide and 180 high. One tile would shrink it to 51 x 96, coverage 0.28. Two rows of 96 x 90
lose nothing, coverage 1: two tiles.

The original centres a cell in its tile. Here it sits in the top left corner and `valid_hw` says which part of the
tile is picture: the rest must become zero *after* normalisation, and a uint8 has no value that normalises to zero.

A copy of this file travels with every exported PyTorch model (`interop/pytorch`): numpy, PIL and the standard library.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import PIL.Image

try:
    from jaxtyping import Float, Int, UInt8
except ImportError:  # beside an exported model, where annotations stay strings that nobody reads
    pass

Box = tuple[int, int, int, int]

_GOOD_COVERAGE = 0.9


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """How a page becomes tiles.

    rule: the name of the rule; see the module docstring.
    tile_size: side S of a tile in pixels; the `image_size` of the vision encoder.
    max_tiles: cells of the largest grid (the thumbnail is not counted).
    thumbnail: prepend the whole image when the grid has more than one cell.
    """

    rule: Literal["ovis"] = "ovis"
    tile_size: int = 384
    max_tiles: int = 9
    thumbnail: bool = True

    def __post_init__(self):
        if self.rule != "ovis":
            raise ValueError(f"TilingConfig.rule: expected 'ovis', got {self.rule!r}")
        if self.tile_size < 1 or self.max_tiles < 1:
            raise ValueError(f"TilingConfig: tile_size and max_tiles must be at least 1, got {self}")

    @property
    def max_tiles_per_image(self) -> int:
        """The most tiles an image can take, thumbnail included."""
        return self.max_tiles + (1 if self.thumbnail and self.max_tiles > 1 else 0)


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Where the tiles of one image come from.

    boxes: for every tile, in order, the part of the page it shows.
    sizes: for every tile the (height, width) in pixels its picture has inside the tile.
    grid: (rows, cols) of the cells.
    has_thumbnail: tile 0 is the whole page; the cells follow, row by row.
    """

    boxes: tuple[Box, ...]
    sizes: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    has_thumbnail: bool

    @property
    def num_tiles(self) -> int:
        return len(self.boxes)

    def map_points(self, xy: Float[np.ndarray, "P 2"]) -> tuple[Int[np.ndarray, " P"], Float[np.ndarray, "P 2"]]:
        """The cell each point (x, y) of the page falls in, and its coordinates there; thumbnails are not considered.

        Coordinates are continuous: pixel i spans [i, i + 1). A point outside the page belongs to the nearest cell and
        keeps its offset, so its coordinates fall outside that cell's picture.

        Example: page 96 x 180, S = 96, two rows, no thumbnail. (10, 100) lies in the second cell, 10 pixels below its
        top, and that cell is not scaled: tile 1, (10, 10).
        """
        xy = np.asarray(xy, np.float64).reshape(-1, 2)
        rows, cols = self.grid
        cells = np.asarray(self.boxes[self.has_thumbnail :], np.float64)  # [rows * cols, 4], row by row
        # The left edges of the first row's cells and the top edges of the first column's; a point belongs to the last
        # cell that starts at or before it.
        col = np.searchsorted(cells[:cols, 0], xy[:, 0], side="right") - 1
        row = np.searchsorted(cells[::cols, 1], xy[:, 1], side="right") - 1
        cell = np.clip(row, 0, rows - 1) * cols + np.clip(col, 0, cols - 1)
        tile = cell + int(self.has_thumbnail)
        origin, corner = cells[cell, :2], cells[cell, 2:]
        size_wh = np.asarray(self.sizes, np.float64)[tile, ::-1]
        return tile, (xy - origin) * size_wh / (corner - origin)


@functools.lru_cache(maxsize=65536)
def plan_tiles(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Choose the grid for an image of `width` x `height` pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"an image has at least one pixel, got {width} x {height}")
    rows, cols = _best_grid(width, height, config)
    boxes = list(_cells(width, height, rows, cols))
    thumbnail = config.thumbnail and len(boxes) > 1
    if thumbnail:
        boxes.insert(0, (0, 0, width, height))
    sizes = tuple(_fit(right - left, bottom - top, config.tile_size) for left, top, right, bottom in boxes)
    return TilePlan(tuple(boxes), sizes, (rows, cols), thumbnail)


def cut_tiles(
    image: PIL.Image.Image, plan: TilePlan, tile_size: int
) -> tuple[UInt8[np.ndarray, "M S S 3"], Int[np.ndarray, "M 2"]]:
    """Crop and resize an RGB image as planned: (tiles, valid_hw), picture top left, zeros around it."""
    tiles = np.zeros((plan.num_tiles, tile_size, tile_size, 3), np.uint8)
    for tile, box, (height, width) in zip(tiles, plan.boxes, plan.sizes, strict=True):
        # Cropped first: resize(box=...) would let pixels across the cell's border into the filter.
        crop = image if box == (0, 0, *image.size) else image.crop(box)
        if crop.size != (width, height):
            crop = crop.resize((width, height), PIL.Image.Resampling.BICUBIC)
        tile[:height, :width] = np.asarray(crop)
    return tiles, np.asarray(plan.sizes, np.int32)


def _best_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    # Cells of no width or height can only be had on images a few pixels wide; they would be empty tiles.
    grids = [
        (rows, cols)
        for rows in range(1, min(config.max_tiles, height) + 1)
        for cols in range(1, min(config.max_tiles // rows, width) + 1)
    ]
    coverage = {grid: _coverage(width, height, *grid, config.tile_size) for grid in grids}
    good = [grid for grid in grids if coverage[grid] > _GOOD_COVERAGE]
    if good:
        return min(good, key=lambda grid: (grid[0] * grid[1], -coverage[grid]))
    return min(grids, key=lambda grid: (-coverage[grid], grid[0] * grid[1]))


def _coverage(width: int, height: int, rows: int, cols: int, side: int) -> float:
    """The share of the image's area that is left when every cell has been shrunk to fit a tile."""
    covered = 0.0
    for left, top, right, bottom in _cells(width, height, rows, cols):
        long, short = max(right - left, bottom - top), min(right - left, bottom - top)
        # The order of operations is that of the public code, so that ties fall the same way.
        covered += side * (short / long * side) if long > side else long * short
    return covered / (width * height)


def _cells(width: int, height: int, rows: int, cols: int) -> Iterator[Box]:
    row_height, col_width = height // rows, width // cols
    for row in range(rows):
        for col in range(cols):
            right = width if col == cols - 1 else (col + 1) * col_width
            bottom = height if row == rows - 1 else (row + 1) * row_height
            yield col * col_width, row * row_height, right, bottom


def _fit(width: int, height: int, side: int) -> tuple[int, int]:
    """(height, width) once the long side is `side`; at least one pixel each way."""
    if width >= height:
        return max(1, int(height / width * side)), side
    return side, max(1, int(width / height * side))
