"""Writes safetensors files for transformers, with the tensors of one file in memory at a time.

Up to a maximum size, all tensors go into `model.safetensors`. Larger models are split into shards
(`model-00001-of-00004.safetensors`, ...), and `model.safetensors.index.json` lists the file of each tensor.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert
from alignvlm_jax.locations import is_local
from alignvlm_jax.models.weight_table import Row
from alignvlm_jax.progress import progress_bar
from alignvlm_jax.storage.transfer import local_file

MAX_SHARD_BYTES = 5 * 10**9
"""Maximum size of a file: the former default of transformers and the Hub."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Key, shape and dtype of a tensor to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_parameters(
    folder: Path,
    rows: Sequence[Row],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str, tuple[int, ...]], np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    title: str = "writing",
) -> None:
    """Writes parameters as PyTorch tensors, in the order of the table.

    Args:
      folder: output folder.
      rows: conversion table; each layer of a stacked parameter becomes a tensor.
      shapes: shapes of the parameters, by path.
      dtypes: dtypes of the tensors, by path.
      read: returns a parameter, or one layer of a stacked parameter: `read("layers/mlp/up/kernel", (3,))`.
      max_shard_bytes: maximum size of a file; see `write_tensors`.
      title: title of the progress bar.

    Raises:
      UserError: see `write_tensors`.
    """
    # A stacked parameter [layers, ...] becomes one tensor per layer.
    sources: dict[TensorSpec, tuple[Row, tuple[int, ...]]] = {}
    for row in rows:
        shape, stacked = shapes[row.path], "{layer}" in row.key
        for index in [(layer,) for layer in range(shape[0])] if stacked else [()]:
            torch_shape = row.transform.torch_shape(shape[len(index) :])
            key = row.key.format(layer=index[0]) if stacked else row.key
            sources[TensorSpec(key, torch_shape, dtypes[row.path])] = row, index

    def produce(spec: TensorSpec) -> np.ndarray:
        row, index = sources[spec]
        return row.transform.to_torch(read(row.path, index))

    write_tensors(folder, list(sources), produce, max_shard_bytes=max_shard_bytes, title=title)


def write_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    title: str = "writing",
) -> None:
    """Writes tensors in order.

    The peak memory is the size of one file plus the memory that `produce` needs for one tensor.

    Args:
      folder: output folder.
      specs: tensors to write.
      produce: returns the values of a tensor, in any memory layout; called once per tensor, in order.
      max_shard_bytes: maximum size of the tensors in a file; a larger tensor gets its own file.
      title: title of the progress bar.

    Raises:
      UserError: if there is not enough free disk space, a file cannot be written, or values exceed the range of
        float16.
    """
    total = sum(spec.num_bytes for spec in specs)
    shards = split_into_shards(specs, max_shard_bytes)
    if is_local(folder):
        # `folder` is usually a scratch folder (`new_folder`), so messages name its parent, which the user knows.
        named, disk, needed = folder.parent, folder, total
    else:
        # Each file is written to a disk before it is uploaded.
        named, disk = folder, Path(tempfile.gettempdir())
        needed = max(sum(spec.num_bytes for spec in shard) for shard in shards)
    free = shutil.disk_usage(disk).free
    if needed > free:
        where = "" if is_local(folder) else f" in {disk} (TMPDIR names another disk)"
        raise UserError(f"{named}: the tensors need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free{where}")
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with progress_bar(desc=title, total=total, unit="B", unit_scale=True, show=total >= 2**27) as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for spec in shard:
                tensors[spec.key] = _contiguous(spec, produce(spec))
                bar.update(spec.num_bytes)
            with local_file(folder / name) as file:
                try:
                    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
                except safetensors.SafetensorError as error:
                    raise UserError(f"{named}: {name} cannot be written: {error}") from error
                file.chmod(0o644)  # The library creates files that only their owner may read.
    # The index comes last, when all the files that it names exist.
    if len(shards) > 1:
        files = {spec.key: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Splits tensors into groups of consecutive tensors, each of which fits into a file."""
    shards, size = [[]], 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def _contiguous(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """Returns the array in the layout of the file: C order, in the dtype of the spec."""
    if array.shape != spec.shape:
        raise ValueError(f"{spec.key} has shape {array.shape}, expected {spec.shape}")
    if array.dtype == spec.dtype and array.flags.c_contiguous:
        return array
    tensor = np.empty(spec.shape, spec.dtype)
    with np.errstate(over="ignore"):  # Overflow is reported below.
        convert.copy_blockwise(array, tensor)
    if spec.dtype == np.float16 and array.dtype != np.float16 and not np.isfinite(tensor).all():
        raise UserError(f"{spec.key} has values that float16 cannot hold: choose bfloat16")
    return tensor
