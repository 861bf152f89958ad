"""Tensors into parameters by a conversion table, one at a time, from the mapped file straight onto the devices.

First every tensor is matched with a parameter by name and shape, and all that does not fit is reported together;
nothing has been allocated by then. Then the parameters are made one after the other: for each shard a host buffer of
its size, filled from the part of the tensors that it needs, and handed to its device. On a CPU the buffer *is* the
parameter (XLA takes over aligned memory as it is), so the peak is what the parameters take, and next to nothing more.
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
from tqdm import tqdm

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import tables
from alignvlm_jax.interop.tensor_reader import TensorFiles

Params = dict[str, Any]

# What a tensor may hold, and in words.
_FLOATS = ("float64", "float32", "float16", "bfloat16"), "floating-point numbers of 16 bits or more"
_INTEGERS = ("int32", "int64"), "whole numbers of 32 bits or more"
# What XLA asks of memory that it takes over instead of copying it.
_ALIGNMENT = 64
# Rows converted at a time where a matrix is turned: they stay in the processor's cache.
_BLOCK = 64


def load_params(
    files: TensorFiles,
    rows: Sequence[tables.Row],
    abstract: Params,
    *,
    source: str | Path,
    ignore: tuple[str, ...] = (),
    rename: Callable[[str], str] | None = None,
    grow: Collection[str] = (),
) -> Params:
    """Reads a parameter tree: `match`, then `read`, which have the arguments' meaning.

    Returns:
      The tree, of `jax.Array`s with the shapes, dtypes and shardings of `abstract`.
    """
    return read(match(files, rows, abstract, source=source, ignore=ignore, rename=rename, grow=grow), source)


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter and the tensors it is made of: one, or one a layer."""

    path: str
    leaf: jax.ShapeDtypeStruct
    files: TensorFiles
    transform: tables.Transform
    keys: tuple[str, ...]
    stacked: bool


def match(
    files: TensorFiles,
    rows: Sequence[tables.Row],
    abstract: Params,
    *,
    source: str | Path,
    ignore: tuple[str, ...] = (),
    rename: Callable[[str], str] | None = None,
    grow: Collection[str] = (),
) -> list[Part]:
    """Pairs parameters with tensors, each once; reads and allocates nothing.

    Args:
      files: what the folder holds.
      rows: which tensor is which parameter; a row for every leaf of `abstract`.
      abstract: the tree to make, of `jax.ShapeDtypeStruct`s; a leaf without a sharding goes to the first device.
      source: named in the error.
      ignore: prefixes of keys that the model has no use for.
      rename: a key of the file -> the key as `rows` and `ignore` have it.
      grow: paths whose leading axis may be longer than the tensor's (a vocabulary with tokens added); the new rows
        become the mean of the old ones, as transformers does it.

    Raises:
      UserError: listing every tensor that is missing, left over, or of another shape or type than it must be.
    """
    leaves = {"/".join(path): leaf for path, leaf in flatten_dict(abstract).items()}
    if sorted(leaves) != sorted(row.path for row in rows):
        raise ValueError(f"table and parameters differ: {sorted(set(leaves) ^ {row.path for row in rows})}")
    names: dict[str, str] = {}
    missing, wrong, twice = [], [], []
    for key in files.shapes:
        name = rename(key) if rename else key
        if name.startswith(ignore):
            continue
        if name in names:
            twice.append(key)
        names[name] = key
    parts, used = [], set()
    for row in rows:
        leaf, stacked = leaves[row.path], "{layer}" in row.key
        keys = [row.key.format(layer=layer) for layer in range(leaf.shape[0])] if stacked else [row.key]
        used.update(keys)
        missing += [key for key in keys if key not in names]
        found = [names[key] for key in keys if key in names]
        expected = row.transform.torch_shape(leaf.shape[1:] if stacked else leaf.shape)
        for key in found:
            shape, dtype = files.shapes[key], files.dtypes[key].name
            allowed, numbers = _INTEGERS if jnp.issubdtype(leaf.dtype, jnp.integer) else _FLOATS
            if dtype not in allowed:
                wrong.append((key, f"holds {dtype}, not {numbers}"))
            elif shape != expected and not (row.path in grow and _grows(shape, expected)):
                wrong.append((key, f"has shape {list(shape)}, the config says {list(expected)}"))
        parts.append(Part(row.path, leaf, files, row.transform, tuple(found), stacked))
    problems = [f"{keys} is missing" for keys in _grouped(missing)]
    for reason in dict.fromkeys(reason for _, reason in wrong):
        problems += [f"{keys} {reason}" for keys in _grouped(key for key, why in wrong if why == reason)]
    problems += [f"{keys} is there twice, under another name too" for keys in _grouped(twice)]
    extra = [key for name, key in names.items() if name not in used]
    problems += [f"{keys} is not part of this model" for keys in _grouped(extra)]
    if problems:
        raise UserError(f"{source}: the tensors do not fit the config: " + "; ".join(problems))
    return parts


def read(parts: Sequence[Part], source: str | Path) -> Params:
    """Makes the parameters that `match` found the tensors of; `source` is named on the progress bar."""
    params = {}
    total = sum(_num_bytes(part.leaf) for part in parts)
    with tqdm(total=total, desc=f"reading {source}", unit="B", unit_scale=True, delay=2, dynamic_ncols=True) as bar:
        for part in parts:
            leaf = part.leaf
            where = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
            # One leaf at a time: transfers that are still under way would hold on to their host buffers.
            array = jax.make_array_from_callback(leaf.shape, where, _Shards(part), dtype=leaf.dtype)
            params[tuple(part.path.split("/"))] = jax.block_until_ready(array)
            bar.update(_num_bytes(leaf))
    return unflatten_dict(params)


class _Shards:
    """From a shard's place in the parameter to its values; replicas share them."""

    def __init__(self, part: Part):
        self._part = part
        self._made: dict[Any, np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self._part.leaf.shape, strict=True))
        if bounds not in self._made:
            self._made[bounds] = self._make(tuple(slice(*bound) for bound in bounds))
        return self._made[bounds]

    def _make(self, index: tuple[slice, ...]) -> np.ndarray:
        shard = _aligned_empty(tuple(part.stop - part.start for part in index), self._part.leaf.dtype)
        if self._part.stacked:
            for layer, key in enumerate(self._part.keys[index[0]]):
                copy(self._tensor(key)[index[1:]], shard[layer])
            return shard
        tensor = self._tensor(self._part.keys[0])
        old = tensor[index]
        copy(old, shard[: len(old)])
        if len(old) < len(shard):
            shard[len(old) :] = np.mean(tensor[:, *index[1:]], axis=0, dtype=np.float64)
        return shard

    def _tensor(self, key: str) -> np.ndarray:
        """As the parameter lies; a view into the file, of which only what is copied is read."""
        return self._part.transform.to_jax(self._part.files.read(key))


def _grows(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and 0 < shape[0] <= expected[0] and shape[1:] == expected[1:]


def _grouped(keys: Iterable[str]) -> list[str]:
    """Keys that differ in their layer alone, as one: "model.layers.{0,1,5}.mlp.up_proj.weight"."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        number = re.search(r"(?<=\.)\d+(?=\.)", key)
        pattern = f"{key[: number.start()]}\0{key[number.end() :]}" if number else key
        groups.setdefault(pattern, []).append(number.group() if number else "")
    shown = []
    for pattern, numbers in groups.items():
        numbers.sort(key=lambda text: int(text or 0))
        shown.append(pattern.replace("\0", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"))
    return sorted(shown)


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = source`, which takes a third of the time for a turned matrix if done block by block."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, source.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        target[:, block] = source[:, block].astype(target.dtype)
