"""Inputs of the analyses: checkpoints with unique names, pages cut into tiles, and the stages of the model.

Axes: M tiles in a batch, S tile side, N features per tile, N' visual tokens per tile, d encoder width, D decoder width.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.data import images, store
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.interop.import_pytorch import read_alignvlm_config
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig
from alignvlm_jax.models.connectors import connector_spec
from alignvlm_jax.progress import progress_bar

Record = Mapping[str, Any]
"""A record of `data/store.py`; `evaluation/runner.py` describes its fields."""

_TILES_PER_BATCH = 16


def model_config(checkpoint: str | os.PathLike) -> AlignVLMConfig:
    """Returns the config of a checkpoint's model without loading its weights, for checks before any long work."""
    folder = trained_model(checkpoint)
    return (read_alignvlm_config(folder) if is_alignvlm_folder(folder) else read_run_config(folder)).model


def load_readers(checkpoints: Sequence[str | os.PathLike], *, batch_size: int = 32) -> Iterator[tuple[str, Reader]]:
    """Yields each reader with a unique name.

    The name is the connector's. If it is taken, the checkpoint's folder is added, and then a number. The configs
    of all checkpoints are read before the first model is loaded, so a missing one is reported at once.
    """
    taken: set[str] = set()
    for checkpoint, config in [(checkpoint, model_config(checkpoint)) for checkpoint in checkpoints]:
        # The first of these names that is free is used.
        connector = connector_spec(config.connector).title
        numbered = (f"{connector} ({checkpoint}, {number})" for number in itertools.count(2))
        names = itertools.chain((connector, f"{connector} ({checkpoint})"), numbered)
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield name, load(checkpoint, batch_size=batch_size)


def open_records(data: str | os.PathLike, split: str) -> Sequence[Record]:
    """Returns the records of a split of a data set."""
    return store.open_dataset(data, split)


def page_images(record: Record) -> list[bytes]:
    """Returns the encoded pages of a record: the image of a document, or the images of a conversation (maybe none)."""
    return list(record["images"]) if "images" in record else [record["image"]] if "image" in record else []


def page_indices(records: Sequence[Record], pages: int) -> list[tuple[int, int]]:
    """Returns the first `pages` pages as pairs: index of the record, index of the image in that record.

    Raises:
      UserError: if no record has an image.
    """
    all_indices = (
        (record, image) for record in range(len(records)) for image in range(len(page_images(records[record])))
    )
    indices = list(itertools.islice(all_indices, pages))
    if not indices:
        raise UserError(f"none of the {len(records):,} records has an image; an analysis needs pages")
    return indices


def tile_batches(
    reader: Reader, records: Sequence[Record], pages: int, *, title: str
) -> Iterator[tuple[UInt8[np.ndarray, "1 M S S 3"], Int[np.ndarray, "1 M 2"]]]:
    """Yields the tiles of the first `pages` pages, cut by the reader, and the valid size of each tile.

    All batches have the same shape. The last one is padded with tiles of valid size 0 x 0.
    """
    # Tiles that wait for their batch to be full.
    side = reader.tiling.tile_size
    tiles, valid_hw = np.zeros((0, side, side, 3), np.uint8), np.zeros((0, 2), np.int32)

    def next_batch():
        missing = max(0, _TILES_PER_BATCH - len(tiles))
        padded = np.pad(tiles[:_TILES_PER_BATCH], ((0, missing), (0, 0), (0, 0), (0, 0)))
        return padded[None], np.pad(valid_hw[:_TILES_PER_BATCH], ((0, missing), (0, 0)))[None]

    indices = page_indices(records, pages)
    for record_index, image_index in progress_bar(indices, title, unit="page", leave=None):
        record = records[record_index]
        cut = reader.cut(images.open_image(page_images(record)[image_index], name=record["id"]))
        tiles, valid_hw = np.concatenate([tiles, cut.tiles]), np.concatenate([valid_hw, cut.valid_hw])
        # Pages share batches: a page may complete several batches, and its last tiles wait for the next page.
        while len(tiles) >= _TILES_PER_BATCH:
            yield next_batch()
            tiles, valid_hw = tiles[_TILES_PER_BATCH:], valid_hw[_TILES_PER_BATCH:]
    if len(tiles):
        yield next_batch()


@functools.partial(jax.jit, static_argnames="model")
def encode(
    model: AlignVLM, variables: Variables, tiles: UInt8[Array, "1 M S S 3"], valid_hw: Int[Array, "1 M 2"]
) -> Float[Array, "M N d"]:
    """Returns the vision features of the tiles: the connector's input."""
    return model.apply(variables, tiles, valid_hw, method="encode_features")


@functools.partial(jax.jit, static_argnames="model")
def connect(model: AlignVLM, variables: Variables, features: Float[Array, "M N d"]) -> Float[Array, "M N' D"]:
    """Returns the visual tokens of the features: the connector's output."""
    return model.apply(variables, method=lambda model: model.connector(features, model.language.embedding).tokens)
