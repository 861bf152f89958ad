"""What an analysis looks at: checkpoints under names of their own, pages as tiles, and what the parts make of them.

Axes: M tiles in a batch, S tile side, N features per tile, N' visual tokens per tile, d encoder width, D decoder width.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.data import images, store
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.interop.import_pytorch import read_alignvlm_config
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig
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


def model_config(checkpoint: str | os.PathLike) -> AlignVLMConfig:
    """What a checkpoint's model is, without its weights: to be asked before long work."""
    folder = trained_model(checkpoint)
    return (read_alignvlm_config(folder) if is_alignvlm_folder(folder) else read_run_config(folder)).model


def load_readers(checkpoints: Sequence[str | os.PathLike], *, batch_size: int = 32) -> Iterator[tuple[str, Reader]]:
    """The readers one after the other, each with a name of its own: its connector's, with its folder's where that is
    taken, with a number where that is taken too. All checkpoints are there before the first is loaded."""
    taken: set[str] = set()
    for checkpoint, config in [(checkpoint, model_config(checkpoint)) for checkpoint in checkpoints]:
        connector = CONNECTOR_NAMES[type(config.connector)]
        numbered = (f"{connector} ({checkpoint}, {number})" for number in itertools.count(2))
        names = itertools.chain((connector, f"{connector} ({checkpoint})"), numbered)
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield name, load(checkpoint, batch_size=batch_size)


def open_records(data: str | os.PathLike, split: str) -> Sequence[Record]:
    """The pages of a data set's split."""
    return store.open_dataset(Path(data), split)


def page_images(record: Record) -> list[bytes]:
    """The pages of a record, encoded: a document's image, or the images of a conversation, which may have none."""
    return list(record["images"]) if "images" in record else [record["image"]] if "image" in record else []


def page_places(records: Sequence[Record], pages: int) -> list[tuple[int, int]]:
    """Where the first `pages` pages are: in which record, and which of its images.

    Raises:
      UserError: no record has an image.
    """
    images_of = (((index, i) for i in range(len(page_images(records[index])))) for index in range(len(records)))
    places = list(itertools.islice(itertools.chain.from_iterable(images_of), pages))
    if not places:
        raise UserError(f"none of the {len(records):,} records has an image: an analysis looks at pages")
    return places


def tile_batches(
    reader: Reader, records: Sequence[Record], pages: int, *, title: str
) -> Iterator[tuple[UInt8[np.ndarray, "1 M S S 3"], Int[np.ndarray, "1 M 2"]]]:
    """The tiles of the first `pages` pages, cut as the reader cuts them, and which part of each is picture.

    All batches have one shape; the last is filled up with tiles of which no part is picture.
    """
    side = reader.tiling.tile_size
    tiles, valid_hw = np.zeros((0, side, side, 3), np.uint8), np.zeros((0, 2), np.int32)

    def batch():
        short = max(0, _TILES_AT_ONCE - len(tiles))
        chosen = np.pad(tiles[:_TILES_AT_ONCE], ((0, short), (0, 0), (0, 0), (0, 0)))
        return chosen[None], np.pad(valid_hw[:_TILES_AT_ONCE], ((0, short), (0, 0)))[None]

    places = page_places(records, pages)
    for index, number in tqdm(places, desc=title, unit="page", dynamic_ncols=True, leave=None):
        record = records[index]
        cut = reader.cut(images.open_image(page_images(record)[number], name=record["id"]))
        tiles, valid_hw = np.concatenate([tiles, cut.tiles]), np.concatenate([valid_hw, cut.valid_hw])
        while len(tiles) >= _TILES_AT_ONCE:
            yield batch()
            tiles, valid_hw = tiles[_TILES_AT_ONCE:], valid_hw[_TILES_AT_ONCE:]
    if len(tiles):
        yield batch()


@functools.partial(jax.jit, static_argnames="model")
def encode(
    model: AlignVLM, variables: Variables, tiles: UInt8[Array, "1 M S S 3"], valid_hw: Int[Array, "1 M 2"]
) -> Float[Array, "M N d"]:
    """What the connector reads of tiles."""
    return model.apply(variables, tiles, valid_hw, method="encode_features")


@functools.partial(jax.jit, static_argnames="model")
def connect(model: AlignVLM, variables: Variables, features: Float[Array, "M N d"]) -> Float[Array, "M N' D"]:
    """What the connector makes of features: visual tokens."""
    return model.apply(variables, method=lambda model: model.connector(features, model.language.embedding).tokens)
