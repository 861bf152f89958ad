"""The rectangle of the page that each patch covers.

Axes: M tiles, R rows and C columns of patches in a tile, N = R * C patches per tile.

A tile shows a box of the page, resized to the tile's image. Its patches are squares of `patch_size` pixels, counted
from the top left corner. The edges of the patches are therefore two increasing lists of page coordinates per tile:

    page 80 x 100, one tile of side 80, patch 8, thumbnail 64 x 80: scale 100 / 80
    xs    0 10 20 30 40 50 60 70 80 | 80 80     the last two columns see only padding: their width is 0
    ys    0 10 20 ... 100

Edges are clipped to the border of the page. If the tile size is not a multiple of the patch size (384 = 27 * 14 + 6),
no patch covers the remaining pixels.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from alignvlm_jax.data.resampling import Resampling
from alignvlm_jax.data.tiling import Box, TilePlan


@dataclasses.dataclass(frozen=True)
class TilePatches:
    """The patches of one tile, in pixels of the page.

    Attributes:
      box: part of the page that the tile shows.
      xs: left edges of the columns, and the right edge of the last one.
      ys: upper edges of the rows, and the lower edge of the last one.
    """

    box: Box
    xs: Float[np.ndarray, " C+1"]
    ys: Float[np.ndarray, " R+1"]

    @property
    def on_page(self) -> Bool[np.ndarray, "R C"]:
        """True for patches that cover a part of the page; the others see only padding."""
        return (np.diff(self.ys) > 0)[:, None] & (np.diff(self.xs) > 0)[None, :]


def tile_patches(plan: TilePlan, patch_size: int, tile_size: int) -> list[TilePatches]:
    """Returns the patches of every tile of a plan, in tile order."""
    width, height = plan.image_size
    edges = np.arange(tile_size // patch_size + 1) * float(patch_size)
    tiles = []
    for (left, top, right, bottom), (tall, wide) in zip(plan.boxes, plan.sizes, strict=True):
        # The image may fill only the top left `tall` x `wide` pixels of the tile. A patch that reaches further ends
        # there.
        xs = left + np.minimum(edges, wide) * (right - left) / wide
        ys = top + np.minimum(edges, tall) * (bottom - top) / tall
        box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        tiles.append(TilePatches(box, np.clip(xs, 0, width), np.clip(ys, 0, height)))
    return tiles


@dataclasses.dataclass(frozen=True)
class Layer:
    """Tiles that cover the page without overlapping: the cells of the grid, or the thumbnail alone."""

    name: str
    tiles: tuple[int, ...]


def layers(plan: TilePlan) -> list[Layer]:
    """Returns the layer of the cells, followed by the layer of the thumbnail if there is one."""
    cells = Layer("tiles", tuple(tile for tile in range(plan.num_tiles) if tile != plan.thumbnail))
    return [cells] if plan.thumbnail is None else [cells, Layer("thumbnail", (plan.thumbnail,))]


def unused_patches(plan: TilePlan, num_patches: int, resampling: Resampling | None) -> Bool[np.ndarray, "M N"]:
    """Returns True for patches that no visual token is computed from.

    Under anyres_max_9 these are the patches that see only the black border; under the other rules there are none.
    """
    used = np.full(plan.num_tiles * num_patches, resampling is None)
    if resampling is not None:
        used[resampling.sources[(resampling.sources >= 0) & (resampling.weights > 0)]] = True
    return ~used.reshape(plan.num_tiles, num_patches)
