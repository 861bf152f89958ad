"""Cut a page into tiles by a predefined grid, and know where every pixel of the page went.

Axis letters: M tiles, S tile side in pixels, P points. Boxes are (left, top, right, bottom) in pixels of the page.

`ovis` ("coverage ratio"), the rule of Ovis, which the paper uses:

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

`internvl`, the rule of InternVL 1.5 and later ("dynamic preprocessing"):

* of the grids with rows * cols <= max_tiles the one whose cols / rows is nearest to width / height, tried from the
  fewest tiles up; on an exact tie the later, larger one is taken only if the image has more than half its pixels;
* the image is stretched to cols * S by rows * S and cut; with more than one cell the whole image, stretched to S by S,
  comes last.

`anyres_max_9`, the rule of LLaVA-NeXT and LLaVA-OneVision:

* of the canvases of cols * S by rows * S, both at most `grid_side`, the one on which the image, fitted in with its
  aspect kept, has the most pixels (no more than its own); ties: the smaller canvas;
* the image is fitted in, up or down, centred on black, and the canvas is cut; the whole image, stretched to S by S,
  always comes first. The black border is part of the tiles, as in the original: black before normalisation.
* what the decoder sees of those tiles, at most about `max_tiles` tiles of tokens, is the matter of `resampling.py`.

A copy of this file travels with every exported PyTorch model (`interop/pytorch`): numpy, PIL and the standard library.
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
except ImportError:  # beside an exported model, where annotations stay strings that nobody reads
    pass

Rule = Literal["ovis", "internvl", "anyres_max_9"]
Box = tuple[float, float, float, float]

_GOOD_COVERAGE = 0.9


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """How a page becomes tiles.

    rule: the name of the rule; see the module docstring.
    tile_size: side S of a tile in pixels; the `image_size` of the vision encoder.
    max_tiles: cells of the largest grid (the thumbnail is not counted). Under anyres_max_9: how many tiles of tokens
      the cells are reduced to, however many they are.
    thumbnail: add the whole image when the grid has more than one cell; under anyres_max_9 always.
    grid_side: most rows, and most columns, of a grid of anyres_max_9; the other rules do not look at it.
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
        """The most tiles an image can take, thumbnail included."""
        if self.rule == "anyres_max_9":
            return self.grid_side**2 + int(self.thumbnail)
        return self.max_tiles + (1 if self.thumbnail and self.max_tiles > 1 else 0)


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture resized to `size` and laid with its top left corner at `origin`; both (x, y) in pixels of the canvas.

    The canvas has the area of the grid's cells, S by S each; what the picture leaves of it is black.
    """

    size: tuple[int, int]
    origin: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Where the tiles of one image come from.

    image_size: (width, height) of the image.
    boxes: for every tile, in order, the part of the page it shows. Whole pixels under ovis; a tile with a black border
      reaches beyond the page.
    sizes: for every tile the (height, width) in pixels its picture (or canvas) has inside the tile.
    grid: (rows, cols) of the cells.
    thumbnail: which tile is the whole page, or None; the others are the cells, row by row.
    canvas: where the cells are cut from; None if each is cropped from the page and resized for itself.
    """

    image_size: tuple[int, int]
    boxes: tuple[Box, ...]
    sizes: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    thumbnail: int | None = None
    canvas: Canvas | None = None

    @property
    def num_tiles(self) -> int:
        return len(self.boxes)

    @property
    def first_cell(self) -> int:
        """The tile that is the grid's top left cell."""
        return 1 if self.thumbnail == 0 else 0

    def map_points(self, xy: Float[np.ndarray, "P 2"]) -> tuple[Int[np.ndarray, " P"], Float[np.ndarray, "P 2"]]:
        """The cell each point (x, y) of the page falls in, and its coordinates there; thumbnails are not considered.

        Coordinates are continuous: pixel i spans [i, i + 1). A point outside the page belongs to the nearest cell and
        keeps its offset, so its coordinates fall outside that cell's picture.

        Example: page 96 x 180, S = 96, two rows, no thumbnail. (10, 100) lies in the second cell, 10 pixels below its
        top, and that cell is not scaled: tile 1, (10, 10).
        """
        xy = np.asarray(xy, np.float64).reshape(-1, 2)
        rows, cols = self.grid
        cells = np.asarray(self.boxes[self.first_cell :][: rows * cols], np.float64)  # [rows * cols, 4], row by row
        # The left edges of the first row's cells and the top edges of the first column's; a point belongs to the last
        # cell that starts at or before it.
        col = np.searchsorted(cells[:cols, 0], xy[:, 0], side="right") - 1
        row = np.searchsorted(cells[::cols, 1], xy[:, 1], side="right") - 1
        cell = np.clip(row, 0, rows - 1) * cols + np.clip(col, 0, cols - 1)
        tile = cell + self.first_cell
        origin, corner = cells[cell, :2], cells[cell, 2:]
        size_wh = np.asarray(self.sizes, np.float64)[tile, ::-1]
        return tile, (xy - origin) * size_wh / (corner - origin)


@functools.lru_cache(maxsize=65536)
def plan_tiles(width: int, height: int, config: TilingConfig) -> TilePlan:
    """Choose the grid for an image of `width` x `height` pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"an image has at least one pixel, got {width} x {height}")
    plan = {"ovis": _plan_ovis, "internvl": _plan_internvl, "anyres_max_9": _plan_anyres}[config.rule]
    return plan(width, height, config)


def cut_tiles(
    image: PIL.Image.Image, plan: TilePlan, tile_size: int
) -> tuple[UInt8[np.ndarray, "M S S 3"], Int[np.ndarray, "M 2"]]:
    """Cut an image as planned: (tiles, valid_hw), picture top left, zeros around it.

    The image is RGB, or grey (mode L), which takes a third of the arithmetic and gives the very same tiles.
    """
    tiles = np.zeros((plan.num_tiles, tile_size, tile_size, 3), np.uint8)
    if plan.canvas is None:
        alone = range(plan.num_tiles)
    else:
        alone = [] if plan.thumbnail is None else [plan.thumbnail]
        _cut_canvas(_resized(image, *plan.canvas.size), plan, tiles[plan.first_cell :])
    for i in alone:
        # Cropped first: resize(box=...) would let pixels across the cell's border into the filter.
        crop = image if plan.boxes[i] == (0, 0, *image.size) else image.crop(plan.boxes[i])
        height, width = plan.sizes[i]
        tiles[i, :height, :width] = _resized(crop, width, height)
    return tiles, np.asarray(plan.sizes, np.int32)


def _cut_canvas(
    picture: UInt8[np.ndarray, "height width 3"], plan: TilePlan, tiles: UInt8[np.ndarray, "M S S 3"]
) -> None:
    """Puts into each cell its part of the picture, without a canvas ever being made."""
    (rows, cols), (left, top), side = plan.grid, plan.canvas.origin, tiles.shape[1]
    for cell in range(rows * cols):
        y, x = cell // cols * side - top, cell % cols * side - left  # the cell's corner in the picture
        y0, x0 = max(y, 0), max(x, 0)
        part = picture[y0 : max(y + side, 0), x0 : max(x + side, 0)]
        tiles[cell, y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]] = part


def _resized(image: PIL.Image.Image, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """Bicubic and antialiased, as the public code of all three rules has it."""
    if image.size != (width, height):
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else np.broadcast_to(pixels[..., None], (height, width, 3))


# ovis


def _plan_ovis(width: int, height: int, config: TilingConfig) -> TilePlan:
    rows, cols = _best_grid(width, height, config)
    boxes = list(_cells(width, height, rows, cols))
    thumbnail = 0 if config.thumbnail and len(boxes) > 1 else None
    if thumbnail == 0:
        boxes.insert(0, (0, 0, width, height))
    sizes = tuple(_fit(right - left, bottom - top, config.tile_size) for left, top, right, bottom in boxes)
    return TilePlan((width, height), tuple(boxes), sizes, (rows, cols), thumbnail)


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


def _cells(width: int, height: int, rows: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
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


# internvl


def _plan_internvl(width: int, height: int, config: TilingConfig) -> TilePlan:
    rows, cols = _nearest_grid(width, height, config)
    canvas = Canvas((cols * config.tile_size, rows * config.tile_size))
    boxes = _canvas_boxes(width, height, rows, cols, canvas, config.tile_size)
    thumbnail = len(boxes) if config.thumbnail and len(boxes) > 1 else None
    if thumbnail is not None:
        boxes.append((0, 0, width, height))
    return TilePlan((width, height), tuple(boxes), _full(boxes, config), (rows, cols), thumbnail, canvas)


def _nearest_grid(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    grids = [(rows, cols) for rows in range(1, config.max_tiles + 1) for cols in range(1, config.max_tiles // rows + 1)]
    nearest, best = math.inf, (1, 1)
    for rows, cols in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1])):
        distance = abs(width / height - cols / rows)
        # Half of the canvas's pixels: an image that has fewer would only be blown up.
        if distance < nearest or (
            distance == nearest and width * height > 0.5 * config.tile_size * config.tile_size * rows * cols
        ):
            nearest, best = distance, (rows, cols)
    return best


# anyres_max_9


def _plan_anyres(width: int, height: int, config: TilingConfig) -> TilePlan:
    side = config.tile_size
    rows, cols = _best_canvas(width, height, config)
    across, down = cols * side / width, rows * side / height
    if across < down:
        size = cols * side, min(math.ceil(height * across), rows * side)
    else:
        size = min(math.ceil(width * down), cols * side), rows * side
    canvas = Canvas(size, ((cols * side - size[0]) // 2, (rows * side - size[1]) // 2))
    boxes = _canvas_boxes(width, height, rows, cols, canvas, side)
    if config.thumbnail:
        boxes.insert(0, (0, 0, width, height))
    thumbnail = 0 if config.thumbnail else None
    return TilePlan((width, height), tuple(boxes), _full(boxes, config), (rows, cols), thumbnail, canvas)


def _best_canvas(width: int, height: int, config: TilingConfig) -> tuple[int, int]:
    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        canvas_height, canvas_width = grid[0] * config.tile_size, grid[1] * config.tile_size
        scale = min(canvas_width / width, canvas_height / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, -(canvas_width * canvas_height)

    sides = range(1, config.grid_side + 1)
    return max(((rows, cols) for rows in sides for cols in sides), key=merit)


# of both


def _canvas_boxes(width: int, height: int, rows: int, cols: int, canvas: Canvas, side: int) -> list[Box]:
    """The part of the page (and of what lies around it) that each cell of the canvas shows."""

    def edges(cells: int, picture: int, origin: int, page: int) -> list[float]:
        return [(cell * side - origin) * page / picture for cell in range(cells + 1)]

    xs = edges(cols, canvas.size[0], canvas.origin[0], width)
    ys = edges(rows, canvas.size[1], canvas.origin[1], height)
    return [(xs[col], ys[row], xs[col + 1], ys[row + 1]) for row in range(rows) for col in range(cols)]


def _full(boxes: list[Box], config: TilingConfig) -> tuple[tuple[int, int], ...]:
    return ((config.tile_size, config.tile_size),) * len(boxes)
