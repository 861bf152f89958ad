"""What an analysis looks at: checkpoints under names of their own, and pages as tiles.

Axes: M tiles in a batch, S tile side.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from alignvlm_jax.data import images, store
from alignvlm_jax.data.tiling import cut_tiles, plan_tiles
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.models.connectors import (
    AlignConfig,
    CAbstractorConfig,
    HReducerConfig,
    MLPConfig,
    OvisConfig,
    PerceiverConfig,
)

Record = Mapping[str, Any]
"""A page as `data/store.py` gives it; `evaluation/runner.py` says what it holds."""

CONNECTOR_NAMES = {
    AlignConfig: "ALIGN",
    MLPConfig: "MLP",
    PerceiverConfig: "Perceiver",
    OvisConfig: "Ovis",
    HReducerConfig: "H-Reducer",
    CAbstractorConfig: "C-Abstractor",
}
_TILES_AT_ONCE = 16


def load_readers(checkpoints: Sequence[str | os.PathLike], *, batch_size: int = 32) -> Iterator[tuple[str, Reader]]:
    """The readers one after the other, each with a name: its connector's, and its folder's where that is taken."""
    taken: set[str] = set()
    for checkpoint in checkpoints:
        reader = load(checkpoint, batch_size=batch_size)
        name = CONNECTOR_NAMES[type(reader.config.connector)]
        if name in taken:
            name = f"{name} ({checkpoint})"
        taken.add(name)
        yield name, reader


def open_records(data: str | os.PathLike, split: str) -> Sequence[Record]:
    """The pages of a data set's split."""
    return store.open_dataset(Path(data), split)


def tile_batches(
    reader: Reader, records: Sequence[Record], pages: int, *, title: str
) -> Iterator[tuple[UInt8[np.ndarray, "1 M S S 3"], Int[np.ndarray, "1 M 2"]]]:
    """The tiles of the first `pages` records, cut as the reader cuts them, and which part of each is picture.

    All batches have one shape; the last is filled up with tiles of which no part is picture.
    """
    side = reader.tiling.tile_size
    tiles, valid_hw = np.zeros((0, side, side, 3), np.uint8), np.zeros((0, 2), np.int32)

    def batch():
        short = max(0, _TILES_AT_ONCE - len(tiles))
        chosen = np.pad(tiles[:_TILES_AT_ONCE], ((0, short), (0, 0), (0, 0), (0, 0)))
        return chosen[None], np.pad(valid_hw[:_TILES_AT_ONCE], ((0, short), (0, 0)))[None]

    for index in tqdm(range(min(pages, len(records))), desc=title, unit="page", dynamic_ncols=True, leave=None):
        image = images.open_image(records[index]["image"], name=records[index]["id"])
        more, more_valid = cut_tiles(image, plan_tiles(*image.size, reader.tiling), side)
        tiles, valid_hw = np.concatenate([tiles, more]), np.concatenate([valid_hw, more_valid])
        while len(tiles) >= _TILES_AT_ONCE:
            yield batch()
            tiles, valid_hw = tiles[_TILES_AT_ONCE:], valid_hw[_TILES_AT_ONCE:]
    if len(tiles):
        yield batch()
