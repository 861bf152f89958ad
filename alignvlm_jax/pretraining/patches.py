"""Labels every patch of a page with the character under it, as the renderer placed it.

Axes: M tiles, N patches per tile (raster order), P characters printed on the page.

The encoder is pre-trained on these labels (one character per patch). The decoder is pre-trained on pages in which each
patch is replaced by its character.
"""

import numpy as np
from jaxtyping import Int

from alignvlm_jax.data.synthetic import Document
from alignvlm_jax.data.tiling import TilePlan

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-/%$#:"
"""Characters that the synthetic documents print. Class 0 means "no character"; class i + 1 is character i."""

_CLASS = {character: index + 1 for index, character in enumerate(CHARACTERS)}


def patch_classes(document: Document, plan: TilePlan, tile_size: int, patch_size: int) -> Int[np.ndarray, "M N"]:
    """Returns the class of the character whose center is in each patch.

    Characters are a little narrower than patches, so two centers may fall into one patch. The later one in reading
    order then moves to the right if that patch is free. Otherwise the earlier one moves to the left. If neither is
    possible, the later one is dropped:

        centers      |P|AI|D| |      classes  P A I D   (I moved to the right, which moved D to the right)
    """
    grid = tile_size // patch_size
    classes = np.zeros((plan.num_tiles, grid, grid), np.int32)
    centers = np.array([((g.left + g.right) / 2, (g.top + g.bottom) / 2) for g in document.glyphs], np.float32)
    tiles, points = plan.map_points(centers)
    # Glyphs come in reading order, so `line` holds the characters to the left of the current one.
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
    """Returns the classes of a page's characters in raster order, without blanks, as a transcription reads them."""
    flat = classes.reshape(-1)
    return flat[flat > 0]
