"""The features that make up each visual token: one feature, or four under the tiling rule `anyres_max_9`.

Axis letters: T visual tokens of an image, M tiles of an image, N visual tokens of one tile after the connector, n rows
and n columns of them (N = n * n; rows and columns may differ).

Under `ovis` and `internvl` the visual tokens of a page are the tokens of its tiles, tile after tile: T = M * N.
LLaVA-NeXT's `anyres_max_9` arranges the tokens of all cells in one grid, as the cells are arranged on the page. Then:

1. Unpad: rows or columns that show only the black border are removed, the same number on both sides.
2. Reduce: the remaining h by w tokens are shrunk bilinearly by r = sqrt(h w / (max_tiles N)) both ways, if r > 1.1.
3. Every row ends with a learned `newline`. The thumbnail's N tokens come first, without newlines.

All of this is linear in the features, uses at most four features per token, and depends only on the size of the image.
It is therefore computed here, on the host, as numbers: four sources and four weights per token, with source -1 for the
newline. The model only gathers and adds, with static shapes.

Example: S = 2 n, a page 2 S wide and S high, no thumbnail, n = 2: one row of two cells, tokens 0-3 and 4-7.

    cells side by side    0 1 4 5        tokens   0 1 4 5 newline 2 3 6 7 newline
                          2 3 6 7        sources  0 1 4 5   -1    2 3 6 7   -1      each with weight 1

The original's tolerance is kept: up to 1.1^2 * 9 = 10.9 tiles of tokens are not reduced. One thing differs: if a page
is so narrow that unpadding would leave nothing (1 x 1000), one row or column is kept.
Sources: LLaVA-NeXT `prepare_inputs_labels_for_multimodal`, and LLaVA-OneVision in transformers, which rounds as here.
A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy and the
standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

try:
    from jaxtyping import Float32, Int32

    from alignvlm_jax.data.tiling import TilePlan, TilingConfig
except ImportError:  # in an exported model, where annotations stay strings that are never evaluated
    pass

# Below this, a reduction is not worth its blur (LLaVA-NeXT's constant).
_MIN_REDUCTION = 1.1

TokenGrid = tuple[int, int]
"""Rows and columns of one tile's visual tokens."""


class Resampling(NamedTuple):
    """Sources of visual tokens: a token is the sum over k of weights[:, k] * feature[sources[:, k]].

    Attributes:
      sources: indices among the M * N features of the image; -1 for the newline, which has weight 1 in k = 0.
      weights: weights of the sources.
    """

    sources: Int32[np.ndarray, "T 4"]
    weights: Float32[np.ndarray, "T 4"]


def num_visual_tokens(plan: TilePlan, config: TilingConfig, token_grid: TokenGrid) -> int:
    """Returns T, the number of visual tokens of an image."""
    per_tile = token_grid[0] * token_grid[1]
    if config.rule != "anyres_max_9":
        return plan.num_tiles * per_tile
    height, width = _reduced_size(*_unpad(plan, token_grid)[1], config.max_tiles, per_tile)
    return height * (width + 1) + (per_tile if plan.thumbnail is not None else 0)


def max_visual_tokens(config: TilingConfig, token_grid: TokenGrid) -> int:
    """Returns an upper bound of T over all images; under anyres_max_9 no image reaches it."""
    rows, cols = token_grid
    if config.rule != "anyres_max_9":
        return config.max_tiles_per_image * rows * cols
    cells = min(config.grid_side**2, _MIN_REDUCTION**2 * config.max_tiles)
    newlines = config.grid_side * rows
    return math.floor(cells * rows * cols) + newlines + (rows * cols if config.thumbnail else 0)


def resample(plan: TilePlan, config: TilingConfig, token_grid: TokenGrid) -> Resampling:
    """Returns the sources of an image's visual tokens under anyres_max_9, by the rule in the module docstring."""
    rows, cols = token_grid
    (top, left), (height, width) = _unpad(plan, token_grid)
    reduced_height, reduced_width = _reduced_size(height, width, config.max_tiles, rows * cols)
    y, y_weight = _two_taps(height, reduced_height)
    x, x_weight = _two_taps(width, reduced_width)
    # Map positions on the page to features, which are numbered tile by tile. The axes are the token's row and column
    # and its two vertical and two horizontal taps.
    row, col = (y + top)[:, None, :, None], (x + left)[None, :, None, :]  # [h', 1, 2, 1], [1, w', 1, 2]
    cell = row // rows * plan.grid[1] + col // cols + plan.first_cell
    cell_sources = cell * (rows * cols) + row % rows * cols + col % cols  # [h', w', 2, 2]
    # Append the newline to every row: source -1 with weight 1.
    newline = np.full((reduced_height, 1, 4), -1)
    sources = np.concatenate([cell_sources.reshape(reduced_height, reduced_width, 4), newline], axis=1).reshape(-1, 4)
    # The weight of a source is the product of its vertical and its horizontal weight.
    share = (y_weight[:, None, :, None] * x_weight[None, :, None, :]).reshape(reduced_height, reduced_width, 4)
    unit_weights = np.tile([1.0, 0.0, 0.0, 0.0], (reduced_height, 1, 1))
    weights = np.concatenate([share, unit_weights], axis=1).reshape(-1, 4)
    # The thumbnail's tokens come first. Each is a single feature: four equal sources, of which only the first counts.
    if plan.thumbnail is not None:
        thumbnail_sources = np.repeat(np.arange(rows * cols)[:, None] + plan.thumbnail * rows * cols, 4, axis=1)
        sources = np.concatenate([thumbnail_sources, sources])
        weights = np.concatenate([np.tile([1.0, 0.0, 0.0, 0.0], (rows * cols, 1)), weights])
    return Resampling(sources.astype(np.int32), weights.astype(np.float32))


def resample_images(plans: Sequence[TilePlan], config: TilingConfig, token_grid: TokenGrid) -> Resampling | None:
    """Returns the sources of all images of an example, with consecutive feature numbers, or None under other rules."""
    if config.rule != "anyres_max_9":
        return None
    sources, weights = [np.zeros((0, 4), np.int32)], [np.zeros((0, 4), np.float32)]
    first = 0
    for plan in plans:
        image_resampling = resample(plan, config, token_grid)
        # The newline, source -1, is the same for all images and is not shifted.
        sources.append(np.where(image_resampling.sources >= 0, image_resampling.sources + first, -1))
        weights.append(image_resampling.weights)
        first += plan.num_tiles * token_grid[0] * token_grid[1]
    return Resampling(np.concatenate(sources), np.concatenate(weights))


def at_positions(visual_index: Int32[np.ndarray, " L"], resampling: Resampling, first_feature: int = 0) -> Resampling:
    """Returns `visual_sources` and `visual_weights` [L, 4] of an example, zeros at text positions.

    Args:
      visual_index: index of the example's visual token at each position; -1 for text.
      resampling: sources of the example's visual tokens; it may have more tokens than `visual_index` refers to.
      first_feature: index in the bin of the example's first feature.
    """
    # Text positions look up token 0 here and are set to zero below.
    number, is_visual = np.maximum(visual_index, 0), (visual_index >= 0)[:, None]
    if not len(resampling.sources):
        return Resampling(np.zeros((len(number), 4), np.int32), np.zeros((len(number), 4), np.float32))
    sources = resampling.sources[number]
    sources = np.where(sources >= 0, sources + first_feature, -1)
    return Resampling(
        np.where(is_visual, sources, 0).astype(np.int32),
        np.where(is_visual, resampling.weights[number], 0).astype(np.float32),
    )


def _unpad(plan: TilePlan, token_grid: TokenGrid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns (top, left) and (height, width), in tokens, of the cells without the black border."""
    (rows, cols), (width, height) = plan.grid, plan.image_size
    tall, wide = rows * token_grid[0], cols * token_grid[1]
    # A cell is square, but a token need not be: a cell's side is token_grid[0] token heights and token_grid[1] token
    # widths. Lengths are in token heights here and in token widths below.
    # A page with a larger aspect ratio than the canvas fills its width, and the border is above and below.
    if width / height > (cols * token_grid[0]) / tall:
        kept = int(round(height * (cols * token_grid[0] / width), 7))  # a quotient of 26.999999 means 27
        border = (tall - max(kept, 1)) // 2
        return (border, 0), (tall - 2 * border, wide)
    kept = int(round(width * (rows * token_grid[1] / height), 7))
    border = (wide - max(kept, 1)) // 2
    return (0, border), (tall, wide - 2 * border)


def _reduced_size(height: int, width: int, max_tiles: int, per_tile: int) -> tuple[int, int]:
    """Returns (height, width) in tokens after the reduction."""
    # Dividing both sides by the factor leaves the tokens of `max_tiles` tiles.
    factor = math.sqrt(height * width / (max_tiles * per_tile))
    if factor <= _MIN_REDUCTION:
        return height, width
    return max(1, int(height // factor)), max(1, int(width // factor))


def _two_taps(size: int, reduced: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sources and weights, [reduced, 2] each, of bilinear interpolation along one axis, without antialiasing.

    Pixel centers are at halves. Example: 3 values a b c and reduced = 2 give the sources [0 1] [1 2] and the weights
    [.75 .25] [.25 .75].
    """
    # Centers of the reduced pixels, in source pixels. The clamps repeat the border pixels.
    positions = np.maximum((np.arange(reduced) + 0.5) * (size / reduced) - 0.5, 0.0)
    first = np.minimum(positions.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    second_weight = positions - first
    return np.stack([first, second], axis=1), np.stack([1.0 - second_weight, second_weight], axis=1)
