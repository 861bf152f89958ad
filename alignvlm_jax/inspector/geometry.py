"""Where on the page each patch looks.

Axis letters: M tiles, R rows and C columns of patches in a tile, N = R * C, T visual tokens.

A tile shows a box of the page, resized to the tile's picture; its patches are squares of `patch_size` pixels from the
top left corner. So the patches' edges are two rising lists of numbers a tile, in pixels of the page:

    page 80 x 100, one tile of side 80, patch 8, thumbnail 64 x 80: scale 100 / 80
    xs    0 10 20 30 40 50 60 70 80 | 80 80     the last two columns look at padding: they have no width here
    ys    0 10 20 ... 100

Edges are cut off at the page's border. What of a tile is left over beyond its last whole patch (384 = 27 * 14 + 6) no
patch looks at.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from alignvlm_jax.data.resampling import Resampling
from alignvlm_jax.data.tiling import Box, TilePlan


@dataclasses.dataclass(frozen=True)
class TilePatches:
    """The patches of one tile, in pixels of the page.

    box: the part of the page that the tile shows.
    xs: left edges of the columns, and the right edge of the last.
    ys: upper edges of the rows, and the lower edge of the last.
    """

    box: Box
    xs: Float[np.ndarray, " C+1"]
    ys: Float[np.ndarray, " R+1"]

    @property
    def on_page(self) -> Bool[np.ndarray, "R C"]:
        """Which patches look at some of the page; the others see padding alone."""
        return (np.diff(self.ys) > 0)[:, None] & (np.diff(self.xs) > 0)[None, :]


def tile_patches(plan: TilePlan, patch_size: int, tile_size: int) -> list[TilePatches]:
    """The patches of every tile of a plan, in the order of the tiles."""
    width, height = plan.image_size
    edges = np.arange(tile_size // patch_size + 1) * float(patch_size)
    tiles = []
    for (left, top, right, bottom), (tall, wide) in zip(plan.boxes, plan.sizes, strict=True):
        # A patch that reaches beyond the tile's picture sees no more of the page than the picture has.
        xs = left + np.minimum(edges, wide) * (right - left) / wide
        ys = top + np.minimum(edges, tall) * (bottom - top) / tall
        box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        tiles.append(TilePatches(box, np.clip(xs, 0, width), np.clip(ys, 0, height)))
    return tiles


@dataclasses.dataclass(frozen=True)
class Layer:
    """Tiles that lie side by side on the page: the cells of the grid, or the thumbnail alone."""

    name: str
    tiles: tuple[int, ...]


def layers(plan: TilePlan) -> list[Layer]:
    """The cells first; then the thumbnail, where there is one."""
    cells = Layer("tiles", tuple(tile for tile in range(plan.num_tiles) if tile != plan.thumbnail))
    return [cells] if plan.thumbnail is None else [cells, Layer("thumbnail", (plan.thumbnail,))]


def left_out(plan: TilePlan, num_patches: int, resampling: Resampling | None) -> Bool[np.ndarray, "M N"]:
    """Patches that no visual token is made of: under anyres_max_9, those that see only the black border."""
    used = np.full(plan.num_tiles * num_patches, resampling is None)
    if resampling is not None:
        used[resampling.sources[(resampling.sources >= 0) & (resampling.weights > 0)]] = True
    return ~used.reshape(plan.num_tiles, num_patches)
