"""Image processor for AlignVLM: cuts images into normalized tiles, as in training.

Axes: M tiles of all images, S tile side, K slots for visual tokens per tile.

    pixel_values  float32 [M, 3, S, S]: pixels in [-1, 1] (x / 127.5 - 1), exactly 0 outside the image
    num_tiles     int64 [images]: number of tiles of each image, in order

Under the tiling rule anyres_max_9, a visual token is a weighted sum of up to four features, or the end of a row:

    visual_sources     int64 [M, K, 4]: indices of features, from the tile's first one on; -2^31 is the end of a row
    visual_weights     float32 [M, K, 4]: weights of the sources; all zero in slots without a visual token
    num_visual_tokens  int64 [images]: number of visual tokens of each image

The visual tokens of an image are dealt out to its tiles in order, and indices are relative to the tile: every input has
one entry per tile, so that engines can slice images apart and join them again in other batches.
"""

import base64
import dataclasses
import functools
import math
import os
import urllib.request
from collections.abc import Iterator

import numpy as np
import PIL.Image
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

# The imports of rgb_alignvlm are repeated here: transformers 5.0 copies only the files that this file imports directly.
from .file_kinds_alignvlm import identify  # noqa: F401
from .png_alignvlm import without_metadata  # noqa: F401
from .resampling_alignvlm import num_visual_tokens, resample_images
from .rgb_alignvlm import open_encoded, to_rgb
from .samples_alignvlm import to_bytes  # noqa: F401
from .tiff_alignvlm import read_page  # noqa: F401
from .tiling_alignvlm import TilePlan, TilingConfig, cut_tiles, plan_tiles

# The source that stands for the end of a row; modeling_alignvlm.py has the same number.
_NEWLINE = -(2**31)
_FIELDS = tuple(field.name for field in dataclasses.fields(TilingConfig))


class AlignVLMImagesKwargs(ImagesKwargs, total=False):
    """Settings that can be changed per call. Fewer tiles are faster but show fewer details.

    Args:
        max_tiles: maximum number of cells of the grid.
        thumbnail: whether a thumbnail of the whole image precedes the cells.
    """

    max_tiles: int
    thumbnail: bool


class AlignVLMImageProcessor(BaseImageProcessor):
    """Cuts images into tiles.

    Args:
        token_grid: number of rows and columns of the visual tokens of a tile.
        **kwargs: fields of `TilingConfig`.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = AlignVLMImagesKwargs

    def __init__(self, token_grid=(1, 1), **kwargs):
        tiling = TilingConfig(**{name: kwargs.pop(name) for name in _FIELDS if name in kwargs})
        super().__init__(**kwargs)
        for name, value in dataclasses.asdict(tiling).items():
            setattr(self, name, value)
        self.token_grid = list(token_grid)

    def tiling(self, **overrides) -> TilingConfig:
        """Returns the tiling settings, with the values of `overrides` that are not None."""
        changes = {name: value for name, value in overrides.items() if name in _FIELDS and value is not None}
        return TilingConfig(**{name: getattr(self, name) for name in _FIELDS} | changes)

    def plan(self, height: int, width: int, **overrides) -> TilePlan:
        """Returns the plan for cutting an image of this size."""
        return plan_tiles(width, height, self.tiling(**overrides))

    def num_visual_tokens(self, height: int, width: int, **overrides) -> int:
        """Returns the number of visual tokens of an image of this size."""
        return num_visual_tokens(self.plan(height, width, **overrides), self.tiling(**overrides), self.token_grid)

    @property
    def size(self) -> dict[str, int]:
        """Size of an image with as many visual tokens as any; vLLM reserves memory for it."""
        width, height = size_with_most_tokens(self.tiling(), tuple(self.token_grid))
        return {"height": height, "width": width}

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        """Cuts images into tiles and normalizes them.

        Args:
            images: a PIL image, a uint8 array or tensor ([H, W], [H, W, 3] or [3, H, W]), a path, a URL, or (nested)
                lists of these.
            return_tensors: "pt" or "np"; by default numpy arrays.
            **kwargs: settings of `TilingConfig` for this call.

        Returns:
            `pixel_values` and `num_tiles`; under anyres_max_9 also `visual_sources`, `visual_weights` and
            `num_visual_tokens`. See the module docstring.
        """
        tiling = self.tiling(**kwargs)
        pixel_values, plans = [], []
        for image in flatten_images(self.fetch_images(images)):
            # Grayscale pages stay in one channel until their tiles are cut, which is faster.
            image = to_rgb(_to_pil(image), keep_gray=True)
            plans.append(plan_tiles(*image.size, tiling))
            pixel_values.append(normalize_tiles(*cut_tiles(image, plans[-1], tiling.tile_size)))
        if not plans:
            raise ValueError("no images were passed; omit `images` for text alone")
        num_tiles = np.asarray([plan.num_tiles for plan in plans], np.int64)
        data = {"pixel_values": np.concatenate(pixel_values), "num_tiles": num_tiles}
        # Only under anyres_max_9: the features that make up each visual token.
        if tiling.rule == "anyres_max_9":
            dealt = [deal_tokens(plan, tiling, tuple(self.token_grid)) for plan in plans]
            data["visual_sources"] = np.concatenate([sources for sources, _ in dealt])
            data["visual_weights"] = np.concatenate([weights for _, weights in dealt])
            counts = [num_visual_tokens(plan, tiling, self.token_grid) for plan in plans]
            data["num_visual_tokens"] = np.asarray(counts, np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls):
        """Opens images given by a path, a URL or base64 text; keeps the structure of nested lists."""
        # Replaces transformers' loader, which renders transparent images on black and clips 16-bit values at 255.
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str | os.PathLike | bytes):
            return _open(image_url_or_urls)
        return image_url_or_urls


def normalize_tiles(tiles: np.ndarray, valid_hw: np.ndarray) -> np.ndarray:
    """Converts tiles, uint8 [M, S, S, 3], to float32 [M, 3, S, S] in [-1, 1], with exactly 0 outside the image."""
    side = np.arange(tiles.shape[1])
    inside = (side < valid_hw[:, 0:1])[:, None, :, None] & (side < valid_hw[:, 1:2])[:, None, None, :]
    pixels = tiles.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return np.where(inside, pixels, np.float32(0.0))


def deal_tokens(plan: TilePlan, config: TilingConfig, token_grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Deals out an image's visual tokens to its tiles, under anyres_max_9.

    Returns:
        `visual_sources` and `visual_weights`, as in the module docstring.
    """
    features_per_tile = token_grid[0] * token_grid[1]
    # Enough for every image: a tile has this many tokens, and at most one newline per row of them.
    slots = features_per_tile + token_grid[0]
    sources, weights = resample_images([plan], config, token_grid)
    tile, slot = np.divmod(np.arange(len(sources)), -(-len(sources) // plan.num_tiles))
    relative = sources.astype(np.int64) - (tile * features_per_tile)[:, None]
    dealt_sources = np.zeros((plan.num_tiles, slots, 4), np.int64)
    dealt_weights = np.zeros((plan.num_tiles, slots, 4), np.float32)
    dealt_sources[tile, slot] = np.where(sources < 0, _NEWLINE, relative)
    dealt_weights[tile, slot] = weights
    return dealt_sources, dealt_weights


@functools.lru_cache
def size_with_most_tokens(config: TilingConfig, token_grid: tuple[int, int]) -> tuple[int, int]:
    """Returns (width, height) of an image that has as many visual tokens as any."""
    side = config.tile_size
    if config.rule != "anyres_max_9":
        # So wide that the longest row of cells is always the best grid, even if a call allows more cells than `config`.
        return max(64, 2 * config.max_tiles) * side, side
    # An image fills the width or the height of its canvas. The other side matters only in whole tokens.
    rows, cols = token_grid
    cells = range(1, config.grid_side + 1)
    sizes = [(math.ceil(t * side / cols), r * side) for r in cells for t in range(1, config.grid_side * cols + 1)]
    sizes += [(c * side, math.ceil(t * side / rows)) for c in cells for t in range(1, config.grid_side * rows + 1)]
    return max(sizes, key=lambda size: num_visual_tokens(plan_tiles(*size, config), config, token_grid))


def flatten_images(images) -> Iterator:
    """Yields the images of nested lists, in order."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from flatten_images(item)
    else:
        yield images


def _open(source: str | os.PathLike | bytes) -> PIL.Image.Image:
    """Opens an image given by a path, an http(s) URL, a data URL, base64 text, or its encoded bytes."""
    if isinstance(source, bytes):
        data = source
    elif os.path.isfile(source):
        with open(source, "rb") as file:
            data = file.read()
    elif str(source).startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=60) as reply:
            data = reply.read()
    elif str(source).startswith("data:"):
        data = base64.b64decode(str(source).split(",", 1)[1])
    else:
        try:
            data = base64.b64decode(str(source), validate=True)
        except ValueError:
            raise ValueError(f"{str(source)[:200]!r} is neither a file, an http(s) URL nor base64 text") from None
    try:
        image = open_encoded(data)
        image.load()
    except ValueError as error:
        where = "the image" if isinstance(source, bytes) else str(source)[:200]
        raise ValueError(f"{where}: {error}") from error
    return image


def _to_pil(image) -> PIL.Image.Image:
    """Converts an array or a tensor to a PIL image."""
    if isinstance(image, PIL.Image.Image):
        return image
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"expected a PIL image or uint8 [H, W, 3], got {array.dtype} of shape {array.shape}")
    # Move the channels of a [C, H, W] array to the end.
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    return PIL.Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.shape[-1:] == (1,) else array))


__all__ = ["AlignVLMImageProcessor"]
