"""Converts tensors to parameters by a conversion table, one parameter at a time, from mapped files to the devices.

First, every tensor is matched with a parameter by name and shape, and all mismatches are reported together. Nothing is
allocated up to this point.

Then the parameters are built one after the other. For each shard, a host buffer of its size is filled from the parts of
the tensors that it needs and transferred to its device. On a CPU, XLA adopts aligned host memory instead of copying it,
so the peak memory is hardly more than the size of the parameters.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import SingleDeviceSharding

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.models.weight_table import Row, Transform
from alignvlm_jax.progress import progress_bar

Params = dict[str, Any]

# Accepted dtypes, and their description for error messages.
_FLOATS = ("float64", "float32", "float16", "bfloat16"), "floating-point numbers of 16 bits or more"
_INTEGERS = ("int32", "int64"), "integers of 32 bits or more"
# Alignment in bytes that XLA requires of memory that it adopts without a copy.
_ALIGNMENT = 64
# Number of columns of a transposed matrix that are converted at a time, so that they stay in the processor's cache.
_BLOCK = 64


def load_params(
    files: TensorFiles,
    rows: Sequence[Row],
    abstract: Params,
    *,
    source: str | Path,
    ignore: tuple[str, ...] = (),
    rename: Callable[[str], str] | None = None,
    grow: Collection[str] = (),
) -> Params:
    """Reads a parameter tree: calls `match` and then `read`, which document the arguments.

    Returns:
      A tree of `jax.Array`s with the shapes, dtypes and shardings of `abstract`.
    """
    return read(match(files, rows, abstract, source=source, ignore=ignore, rename=rename, grow=grow), source)


@dataclasses.dataclass(frozen=True)
class ParameterSource:
    """A parameter and its tensors: a single one, or one per layer if the parameter is stacked.

    Attributes:
      path: path of the parameter.
      leaf: its shape, dtype and sharding.
      files: the files of the tensors.
      transform: conversion between the layouts of tensor and parameter.
      keys: keys of the tensors in the files.
      stacked: True if there is one tensor per layer.
    """

    path: str
    leaf: jax.ShapeDtypeStruct
    files: TensorFiles
    transform: Transform
    keys: tuple[str, ...]
    stacked: bool


def match(
    files: TensorFiles,
    rows: Sequence[Row],
    abstract: Params,
    *,
    source: str | Path,
    ignore: tuple[str, ...] = (),
    rename: Callable[[str], str] | None = None,
    grow: Collection[str] = (),
) -> list[ParameterSource]:
    """Finds the tensors of each parameter, without reading or allocating anything.

    Args:
      files: tensors of the folder.
      rows: conversion table, with one row for every leaf of `abstract`.
      abstract: parameter tree of `jax.ShapeDtypeStruct`s; a leaf without a sharding goes to the first device.
      source: name of the folder in error messages.
      ignore: prefixes of keys that the model does not use.
      rename: maps a key of the files to the key used in `rows` and `ignore`.
      grow: paths whose leading axis may be longer than the tensor's (a vocabulary with added tokens). As in
        transformers, the new rows are the mean of the old ones.

    Raises:
      UserError: if tensors are missing, unknown, duplicated, or of the wrong shape or dtype; lists all of them.
    """
    # The table itself must cover the model exactly; anything else is a bug and not a user's mistake.
    leaves = {"/".join(path): leaf for path, leaf in flatten_dict(abstract).items()}
    if sorted(leaves) != sorted(row.path for row in rows):
        raise ValueError(f"table and parameters differ: {sorted(set(leaves) ^ {row.path for row in rows})}")
    # Map the keys of the table to the keys in the files.
    names: dict[str, str] = {}
    missing, mismatched, duplicated = [], [], []
    for key in files.shapes:
        name = rename(key) if rename else key
        if name.startswith(ignore):
            continue
        if name in names:
            duplicated.append(key)
        names[name] = key
    # Find the tensors of each row, and check their shapes and dtypes.
    sources, used = [], set()
    for row in rows:
        leaf, stacked = leaves[row.path], "{layer}" in row.key
        keys = [row.key.format(layer=layer) for layer in range(leaf.shape[0])] if stacked else [row.key]
        used.update(keys)
        missing += [key for key in keys if key not in names]
        present = [names[key] for key in keys if key in names]
        expected = row.transform.torch_shape(leaf.shape[1:] if stacked else leaf.shape)
        for key in present:
            shape, dtype = files.shapes[key], files.dtypes[key].name
            allowed, description = _INTEGERS if jnp.issubdtype(leaf.dtype, jnp.integer) else _FLOATS
            if dtype not in allowed:
                mismatched.append((key, f"has dtype {dtype}, expected {description}"))
            elif shape != expected and not (row.path in grow and _can_grow(shape, expected)):
                mismatched.append((key, f"has shape {list(shape)}, the config says {list(expected)}"))
        sources.append(ParameterSource(row.path, leaf, files, row.transform, tuple(present), stacked))
    # Report all problems, with the layers of a stacked parameter in one entry.
    problems = [f"{keys} is missing" for keys in _merge_layers(missing)]
    for reason in dict.fromkeys(reason for _, reason in mismatched):
        problems += [f"{keys} {reason}" for keys in _merge_layers(key for key, why in mismatched if why == reason)]
    problems += [f"{keys} appears twice, under different names" for keys in _merge_layers(duplicated)]
    extra = [key for name, key in names.items() if name not in used]
    problems += [f"{keys} is not part of this model" for keys in _merge_layers(extra)]
    if problems:
        raise UserError(f"{source}: the tensors do not fit the config: " + "; ".join(problems))
    return sources


def read(parameters: Sequence[ParameterSource], source: str | Path) -> Params:
    """Reads the parameters found by `match`; `source` is the name of the folder on the progress bar."""
    params = {}
    total = sum(_num_bytes(parameter.leaf) for parameter in parameters)
    with progress_bar(desc=f"reading {source}", total=total, unit="B", unit_scale=True, delay=2) as bar:
        for parameter in parameters:
            leaf = parameter.leaf
            sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
            array = jax.make_array_from_callback(leaf.shape, sharding, _ShardReader(parameter), dtype=leaf.dtype)
            # Wait for each parameter: a transfer in progress would keep its host buffer alive.
            params[tuple(parameter.path.split("/"))] = jax.block_until_ready(array)
            bar.update(_num_bytes(leaf))
    return unflatten_dict(params)


class _ShardReader:
    """Callback that returns the values of a shard, given its index in the parameter; replicas share an array."""

    def __init__(self, parameter: ParameterSource):
        self._parameter = parameter
        self._shards: dict[Any, np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, self._parameter.leaf.shape, strict=True))
        if bounds not in self._shards:
            self._shards[bounds] = self._read(tuple(slice(*bound) for bound in bounds))
        return self._shards[bounds]

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the shard at this index (slices with bounds) of the parameter."""
        shard = _aligned_empty(tuple(axis.stop - axis.start for axis in index), self._parameter.leaf.dtype)
        if self._parameter.stacked:
            # The leading axis of the parameter selects tensors, the other axes select a part of each.
            for layer, key in enumerate(self._parameter.keys[index[0]]):
                copy_blockwise(self._tensor(key)[index[1:]], shard[layer])
            return shard
        tensor = self._tensor(self._parameter.keys[0])
        # A grown table is longer than its tensor, so the slice ends early. Fill the remaining rows with the mean of
        # all rows of the tensor, summed in float64 because there may be 100,000 of them.
        old = tensor[index]
        copy_blockwise(old, shard[: len(old)])
        if len(old) < len(shard):
            shard[len(old) :] = np.mean(tensor[:, *index[1:]], axis=0, dtype=np.float64)
        return shard

    def _tensor(self, key: str) -> np.ndarray:
        """Returns a tensor in the layout of the parameter: a view into the file, which reads only what is copied."""
        return self._parameter.transform.to_jax(self._parameter.files.read(key))


def _can_grow(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and 0 < shape[0] <= expected[0] and shape[1:] == expected[1:]


def _merge_layers(keys: Iterable[str]) -> list[str]:
    """Merges keys that differ only in the number of the layer: "model.layers.{0,1,5}.mlp.up_proj.weight"."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        # \0 marks the place of the number in the pattern, because it cannot occur in a key.
        number = re.search(r"(?<=\.)\d+(?=\.)", key)
        pattern = f"{key[: number.start()]}\0{key[number.end() :]}" if number else key
        groups.setdefault(pattern, []).append(number.group() if number else "")
    merged = []
    for pattern, numbers in groups.items():
        numbers.sort(key=lambda text: int(text or 0))
        merged.append(pattern.replace("\0", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"))
    return sorted(merged)


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array in memory that XLA can adopt."""
    size = int(np.prod(shape)) * dtype.itemsize
    # Allocate a few bytes more, and begin at the first aligned address.
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_blockwise(source: np.ndarray, target: np.ndarray) -> None:
    """Copies `source` to `target` and converts the dtype."""
    # Blocks of a transposed matrix fit into the processor's cache, so copying takes a third of the time.
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        target[:, block] = source[:, block].astype(target.dtype)
