"""Tensors into safetensors files as transformers reads them, with one file's worth of them in memory at a time.

Up to a size all tensors go into `model.safetensors`. Beyond it they are spread over `model-00001-of-00004.safetensors`
and so on, with `model.safetensors.index.json` saying which tensor is where.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, tables

MAX_SHARD_BYTES = 5 * 10**9
"""Where transformers and the Hub used to cut, and still small enough to be moved about."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_parameters(
    folder: Path,
    rows: Sequence[tables.Row],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str, tuple[int, ...]], np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    title: str = "writing",
) -> None:
    """Writes parameters as PyTorch's tensors, in the order of the table.

    Args:
      folder: where the files go.
      rows: which parameter is which tensor; of stacked layers each is a tensor.
      shapes: of the parameters, by path.
      dtypes: that the tensors will have, by path.
      read: gives a parameter, or of stacked ones that of a layer: `read("layers/mlp/up/kernel", (3,))`.
      max_shard_bytes, title: as for `write_tensors`, which has the errors, too.
    """
    parts: dict[TensorSpec, tuple[tables.Row, tuple[int, ...]]] = {}
    for row in rows:
        shape, stacked = shapes[row.path], "{layer}" in row.key
        for index in [(layer,) for layer in range(shape[0])] if stacked else [()]:
            of_torch = row.transform.torch_shape(shape[len(index) :])
            key = row.key.format(layer=index[0]) if stacked else row.key
            parts[TensorSpec(key, of_torch, dtypes[row.path])] = row, index

    def produce(spec: TensorSpec) -> np.ndarray:
        row, index = parts[spec]
        return row.transform.to_torch(read(row.path, index))

    write_tensors(folder, list(parts), produce, max_shard_bytes=max_shard_bytes, title=title)


def write_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    title: str = "writing",
) -> None:
    """Writes tensors, in order.

    Memory: the tensors of one file, and what `produce` needs for one tensor.

    Args:
      folder: where the files go.
      specs: what they will hold.
      produce: gives a tensor when its turn comes, in any memory layout.
      max_shard_bytes: tensors a file may hold; a larger tensor has a file of its own.
      title: of the progress bar.

    Raises:
      UserError: the disk has not the room, or does not take it.
    """
    total = sum(spec.num_bytes for spec in specs)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(f"{folder.parent}: the tensors need {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    shards = split_into_shards(specs, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=total < 2**27) as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for spec in shard:
                tensors[spec.key] = _contiguous(spec, produce(spec))
                bar.update(spec.num_bytes)
            try:
                safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
            except safetensors.SafetensorError as error:
                raise UserError(f"{folder.parent}: {name} cannot be written: {error}") from error
            (folder / name).chmod(0o644)  # the library's files are their owner's alone
    if len(shards) > 1:
        where = {spec.key: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors that fit a file together."""
    shards, filled = [[]], 0
    for spec in specs:
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.num_bytes
    return shards


def _contiguous(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The array as it lies in the file: of the spec's dtype, row by row."""
    if array.shape != spec.shape:
        raise ValueError(f"{spec.key} has shape {array.shape}, its spec says {spec.shape}")
    if array.dtype == spec.dtype and array.flags.c_contiguous:
        return array
    tensor = np.empty(spec.shape, spec.dtype)
    with np.errstate(over="ignore"):
        convert.copy(array, tensor)
    if spec.dtype == np.float16 and array.dtype != np.float16 and not np.isfinite(tensor).all():
        raise UserError(f"{spec.key} has values that float16 cannot hold: choose bfloat16")
    return tensor
