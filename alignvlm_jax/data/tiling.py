"""Cuts a page into a grid of tiles and maps points of the page to tiles.

Axis letters: M tiles, S tile side in pixels, P points. Boxes are (left, top, right, bottom) in pixels of the page.

`ovis` ("coverage ratio"), the rule of Ovis, which the paper uses:

* All grids of rows x cols with rows * cols <= max_tiles are compared. A cell is h // rows by w // cols pixels; the last
  row and column also take the remainder.
* A cell covers the area it has after its long side is shrunk (never enlarged) to S. The coverage of a grid is the sum
  over its cells divided by the area of the image: the share of detail that is kept.
* If any grid covers more than 0.9, the one with the fewest tiles is used (ties: the larger coverage). Otherwise the
  largest coverage is used (ties: fewer tiles).
* Every cell is resized, up or down, until its long side is S, keeping its aspect ratio. With more than one cell, the
  complete image comes first as a thumbnail.

Example, S = 96: a page 96 wide and 180 high. One tile would shrink it to 51 x 96 (coverage 0.28). Two cells of 96 x 90
lose nothing (coverage 1), so the grid has two rows.

The original centers a cell in its tile. Here the cell is in the top left corner, and `valid_hw` is the size of the
image inside the tile: the rest must become zero *after* normalization, and no uint8 value normalizes to zero.

`internvl`, the rule of InternVL 1.5 and later ("dynamic preprocessing"):

* Of the grids with rows * cols <= max_tiles, the one whose cols / rows is nearest to width / height is used. Grids are
  compared from the fewest tiles up. On an exact tie the later, larger grid is used only if the image has more than half
  its pixels.
* The image is stretched to cols * S by rows * S and cut. With more than one cell, the complete image, stretched to S by
  S, comes last.

`anyres_max_9`, the rule of LLaVA-NeXT and LLaVA-OneVision:

* A canvas has cols * S by rows * S pixels, with cols and rows at most `grid_side`. For each canvas, count the pixels of
  the image when it is resized to fit, keeping its aspect ratio, but at most its original number of pixels. The canvas
  with the highest count is used (ties: the smaller canvas).
* The image is resized to fit, up or down, centered on black, and the canvas is cut. The complete image, stretched to S
  by S, always comes first. As in the original, the black border is part of the tiles and is black before normalization.
* `resampling.py` then reduces the visual tokens of the cells to about as many as `max_tiles` tiles have, or fewer.

A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy, PIL and the
standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import PIL.Image

try:
    from jaxtyping import Float, Int, UInt8
except ImportError:  # in an exported model, where annotations stay strings that are never evaluated
    pass

Rule = Literal["ovis", "internvl", "anyres_max_9"]
Box = tuple[float, float, float, float]

_GOOD_COVERAGE = 0.9


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """Rule and sizes for cutting a page into tiles.

    Attributes:
      rule: name of the rule; see the module docstring.
      tile_size: side S of a tile in pixels; equals the `image_size` of the vision encoder.
      max_tiles: largest number of cells of a grid (without the thumbnail). Under anyres_max_9 it limits the tokens
        instead of the cells: all cells together keep about as many tokens as this number of tiles has.
      thumbnail: whether to add the complete image as another tile. Under ovis and internvl, it is added only if the
        grid has more than one cell.
      grid_side: largest number of rows and of columns of an anyres_max_9 grid; the other rules ignore it.
    """

    rule: Rule = "ovis"
    tile_size: int = 384
    max_tiles: int = 9
    thumbnail: bool = True
    grid_side: int = 6

    def __post_init__(self):
        if self.rule not in get_args(Rule):
            raise ValueError(f"TilingConfig.rule: expected one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if min(self.tile_size, self.max_tiles, self.grid_side) < 1:
            raise ValueError(f"TilingConfig: tile_size, max_tiles and grid_side must be at least 1, got {self}")

    @property
    def max_tiles_per_image(self) -> int:
        """Largest number of tiles of an image, thumbnail included."""
        if self.rule == "anyres_max_9":
            return self.grid_side**2 + int(self.thumbnail)
        return self.max_tiles + (1 if self.thumbnail and self.max_tiles > 1 else 0)


@dataclasses.dataclass(frozen=True)
class Canvas:
    """An image resized to `size`, with its top left corner at `origin`; both are (x, y) in pixels of the canvas.

    The canvas covers the grid's cells, which are S by S each. Its pixels outside the image are black.
    """

    size: tuple[int, int]
    origin: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """The positions of the tiles of one image.

    Attributes:
      image_size: (width, height) of the image.
      boxes: the part of the page that each tile shows, in order. Under ovis, all coordinates are whole numbers. The box
        of a tile with a black border extends beyond the page.
      sizes: (height, width) in pixels of the image (or canvas) inside each tile.
      grid: (rows, cols) of the cells.
      thumbnail: index of the tile that shows the complete page, or None. The other tiles are the cells, row by row.
      canvas: canvas that the cells are cut from; None if each cell is cropped from the page and resized separately.
    """

    image_size: tuple[int, int]
    boxes: tuple[Box, ...]
    sizes: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    thumbnail: int | None = None
    canvas: Canvas | None = None

    @property
    def num_tiles(self) -> int:
        """Number of tiles, thumbnail included."""
        return len(self.boxes)

    @property
    def first_cell(self) -> int:
        """Index of the tile that is the grid's top left cell."""
        return 1 if self.thumbnail == 0 else 0

    def map_points(self, xy: Float[np.ndarray, "P 2"]) -> tuple[Int[np.ndarray, " P"], Float[np.ndarray, "P 2"]]:
        """Returns the tile of each point (x, y) of the page, never the thumbnail, and the coordinates in that tile.

        Coordinates are continuous: pixel i spans [i, i + 1). A point outside the page belongs to the nearest cell and
        keeps its offset, so its coordinates are outside that cell's image.

        Example: a page of 96 x 180, S = 96, two rows, no thumbnail. (10, 100) is in the second cell, 10 pixels below
        its top, and cells are not scaled. The result is tile 1 and (10, 10).
        """
        xy = np.asarray(xy, np.float64).reshape(-1, 2)
        rows, cols = self.grid
        cells = np.asarray(self.boxes[self.first_cell :][: rows * cols], np.float64)  # [rows * cols, 4], row by row
        # Search among the left edges of the first row's cells and the top edges of the first column's cells. A point
        # belongs to the last cell that starts at or before it.
        col = np.searchsorted(cells[:cols, 0], xy[:, 0], side="right") - 1
        row = np.searchsorted(cells[::cols, 1], xy[:, 1], side="right") - 1
        cell = np.clip(row, 0, rows - 1) * cols + np.clip(col, 0, cols - 1)
        tile = cell + self.first_cell
        origin, corner = cells[cell, :2], cells[cell, 2:]
        size_wh = np.asarray(self.sizes, np.float64)[tile, ::-1]
        return tile, (xy - origin) * size_wh / (corner - origin)


@functools.lru_cache(maxsize=65536)
def plan_tiles(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Returns the tiles of an image of `width` x `height` pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"expected an image of at least one pixel, got {width} x {height}")
    plan = {"ovis": _plan_ovis, "internvl": _plan_internvl, "anyres_max_9": _plan_anyres}[config.rule]
    return plan(width, height, config)


def cut_tiles(
    image: PIL.Image.Image, plan: TilePlan, tile_size: int
) -> tuple[UInt8[np.ndarray, "M S S 3"], Int[np.ndarray, "M 2"]]:
    """Cuts an image as planned and returns (tiles, valid_hw): the pixels, and the size of the image in each tile.

    The image is in the top left corner of its tile, and the rest of the tile is zero.

    The image is RGB or grayscale (mode L). Grayscale takes a third of the arithmetic and gives identical tiles.
    """
    tiles = np.zeros((plan.num_tiles, tile_size, tile_size, 3), np.uint8)
    # The cells of a canvas are cut from one resized image; all other tiles are resized separately.
    if plan.canvas is None:
        separate_tiles = range(plan.num_tiles)
    else:
        separate_tiles = [] if plan.thumbnail is None else [plan.thumbnail]
        _cut_canvas(_resize(image, *plan.canvas.size), plan, tiles[plan.first_cell :])
    for i in separate_tiles:
        # Crop before resizing: resize(box=...) would let the filter read pixels beyond the cell's border.
        crop = image if plan.boxes[i] == (0, 0, *image.size) else image.crop(plan.boxes[i])
        height, width = plan.sizes[i]
        tiles[i, :height, :width] = _resize(crop, width, height)
    return tiles, np.asarray(plan.sizes, np.int32)


def _cut_canvas(
    image: UInt8[np.ndarray, "height width 3"], plan: TilePlan, tiles: UInt8[np.ndarray, "M S S 3"]
) -> None:
    """Copies each cell's part of the resized image into its tile. Does not allocate the canvas."""
    (rows, cols), (left, top), side = plan.grid, plan.canvas.origin, tiles.shape[1]
    for cell in range(rows * cols):
        y, x = cell // cols * side - top, cell % cols * side - left  # the cell's corner, relative to the image
        # If the corner is in the border (negative y or x), the image begins inside the tile.
        y0, x0 = max(y, 0), max(x, 0)
        part = image[y0 : max(y + side, 0), x0 : max(x + side, 0)]
        tiles[cell, y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]] = part


def _resize(image: PIL.Image.Image, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the pixels of the resized image (bicubic, antialiased, as in the public code of all three rules)."""
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    # Broadcast without a copy, because all three channels of a grayscale image are the same.
    return pixels if pixels.ndim == 3 else np.broadcast_to(pixels[..., None], (height, width, 3))


# Rule ovis.


def _plan_ovis(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Returns the tiles under the rule ovis."""
    rows, cols = _best_grid(width, height, config)
    boxes = list(_cells(width, height, rows, cols))
    thumbnail = 0 if config.thumbnail and len(boxes) > 1 else None
    if thumbnail == 0:
        boxes.insert(0, (0, 0, width, height))
    sizes = tuple(_fit(right - left, bottom - top, config.tile_size) for left, top, right, bottom in boxes)
    return TilePlan((width, height), tuple(boxes), sizes, (rows, cols), thumbnail)


def _best_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    """Returns the (rows, cols) that the rule ovis chooses."""
    # No more rows or columns than pixels, or an image a few pixels wide would get cells of width 0.
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
    """Returns the share of the image's area that is left after every cell has been shrunk to fit a tile."""
    covered = 0.0
    for left, top, right, bottom in _cells(width, height, rows, cols):
        long, short = max(right - left, bottom - top), min(right - left, bottom - top)
        # The same order of operations as in the public code, so that rounding breaks ties the same way.
        covered += side * (short / long * side) if long > side else long * short
    return covered / (width * height)


def _cells(width: int, height: int, rows: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the boxes of the cells, row by row. The last row and column also take the remainder."""
    row_height, col_width = height // rows, width // cols
    for row in range(rows):
        for col in range(cols):
            right = width if col == cols - 1 else (col + 1) * col_width
            bottom = height if row == rows - 1 else (row + 1) * row_height
            yield col * col_width, row * row_height, right, bottom


def _fit(width: int, height: int, side: int) -> tuple[int, int]:
    """Returns (height, width) after resizing the long side to `side`. Both are at least one pixel."""
    if width >= height:
        return max(1, int(height / width * side)), side
    return side, max(1, int(width / height * side))


# Rule internvl.


def _plan_internvl(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Returns the tiles under the rule internvl."""
    rows, cols = _nearest_grid(width, height, config)
    canvas = Canvas((cols * config.tile_size, rows * config.tile_size))
    boxes = _canvas_boxes(width, height, rows, cols, canvas, config.tile_size)
    thumbnail = len(boxes) if config.thumbnail and len(boxes) > 1 else None
    if thumbnail is not None:
        boxes.append((0, 0, width, height))
    return TilePlan((width, height), tuple(boxes), _full_sizes(boxes, config), (rows, cols), thumbnail, canvas)


def _nearest_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    """Returns the (rows, cols) that the rule internvl chooses."""
    grids = [(rows, cols) for rows in range(1, config.max_tiles + 1) for cols in range(1, config.max_tiles // rows + 1)]
    nearest, best = math.inf, (1, 1)
    for rows, cols in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1])):
        distance = abs(width / height - cols / rows)
        # On a tie, the larger grid must be worth it: a much smaller image would only be enlarged.
        if distance < nearest or (
            distance == nearest and width * height > 0.5 * config.tile_size * config.tile_size * rows * cols
        ):
            nearest, best = distance, (rows, cols)
    return best


# Rule anyres_max_9.


def _plan_anyres(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Returns the tiles under the rule anyres_max_9."""
    side = config.tile_size
    rows, cols = _best_canvas(width, height, config)
    across, down = cols * side / width, rows * side / height  # scales that fill the canvas's width and height
    # Use the smaller scale, so that the image fits, and center it on the canvas.
    if across < down:
        size = cols * side, min(math.ceil(height * across), rows * side)
    else:
        size = min(math.ceil(width * down), cols * side), rows * side
    canvas = Canvas(size, ((cols * side - size[0]) // 2, (rows * side - size[1]) // 2))
    boxes = _canvas_boxes(width, height, rows, cols, canvas, side)
    if config.thumbnail:
        boxes.insert(0, (0, 0, width, height))
    thumbnail = 0 if config.thumbnail else None
    return TilePlan((width, height), tuple(boxes), _full_sizes(boxes, config), (rows, cols), thumbnail, canvas)


def _best_canvas(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    """Returns the (rows, cols) that the rule anyres_max_9 chooses."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        canvas_height, canvas_width = grid[0] * config.tile_size, grid[1] * config.tile_size
        scale = min(canvas_width / width, canvas_height / height)
        # Enlarging an image adds no detail, so no more than its own pixels count.
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, -(canvas_width * canvas_height)

    sides = range(1, config.grid_side + 1)
    return max(((rows, cols) for rows in sides for cols in sides), key=merit)


# Rules with a canvas.


def _canvas_boxes(width: int, height: int, rows: int, cols: int, canvas: Canvas, side: int) -> list[Box]:
    """Returns the box of each cell in page pixels. Boxes extend beyond the page where the canvas has a border."""

    # Edges of the cells along one axis, mapped from the canvas back to the page.
    def edges(cells: int, size: int, origin: int, page: int) -> list[float]:
        return [(cell * side - origin) * page / size for cell in range(cells + 1)]

    xs = edges(cols, canvas.size[0], canvas.origin[0], width)
    ys = edges(rows, canvas.size[1], canvas.origin[1], height)
    return [(xs[col], ys[row], xs[col + 1], ys[row + 1]) for row in range(rows) for col in range(cols)]


def _full_sizes(boxes: list[Box], config: TilingConfig) -> tuple[tuple[int, int], ...]:
    """Returns (height, width) of tiles that their images fill completely."""
    return ((config.tile_size, config.tile_size),) * len(boxes)
