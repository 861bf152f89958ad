"""Which character lies under each patch of a page: the renderer knows, so the encoder can be told.

Axes: M tiles, N patches per tile (raster order), P characters printed on the page.

These labels pre-train the encoder (character per patch) and lay text out for the decoder ("the page in its own words").
"""

import numpy as np
from jaxtyping import Int

from alignvlm_jax.data.synthetic import Document
from alignvlm_jax.data.tiling import TilePlan

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-/%$#:"
"""What the synthetic documents print. Class 0 is "nothing here"; class i + 1 is character i."""

_CLASS = {character: index + 1 for index, character in enumerate(CHARACTERS)}


def patch_classes(document: Document, plan: TilePlan, tile_size: int, patch_size: int) -> Int[np.ndarray, "M N"]:
    """The class of the character whose centre lies in each patch.

    Two centres may fall into one patch, since characters are a little narrower than patches. The later one (reading
    order) then moves right if that patch is free, else the earlier one moves left, else the later one is dropped:

        centres      |P|AI|D| |      classes  P A I D   (I moved right, which moved D right)
    """
    grid = tile_size // patch_size
    classes = np.zeros((plan.num_tiles, grid, grid), np.int32)
    centres = np.array([((g.left + g.right) / 2, (g.top + g.bottom) / 2) for g in document.glyphs], np.float32)
    tiles, points = plan.map_points(centres)
    for glyph, tile, (x, y) in zip(document.glyphs, tiles, points, strict=True):
        row, column = min(int(y // patch_size), grid - 1), min(int(x // patch_size), grid - 1)
        line = classes[tile, row]
        if line[column]:
            if column + 1 < grid and not line[column + 1]:
                column += 1
            elif column and not line[column - 1]:
                line[column - 1] = line[column]
            else:
                continue
        line[column] = _CLASS[glyph.char]
    return classes.reshape(plan.num_tiles, grid * grid)


def reading_order(classes: Int[np.ndarray, "M N"]) -> Int[np.ndarray, " P"]:
    """The characters of a page in raster order, blanks left out: what a transcription from left to right would say."""
    flat = classes.reshape(-1)
    return flat[flat > 0]
