"""Reads the tensors of a Hugging Face folder lazily, from memory-mapped safetensors files.

    with TensorFiles("llama/") as files:
        files.shapes["model.norm.weight"]                 # known without reading any data
        files.read("model.embed_tokens.weight", 17)       # one row: reads only its pages

`read` returns a view into the file. Slicing or transposing the view reads no data, and copying a part of it reads only
that part. A tensor itself never takes up memory; only copies of it do.
"""

import json
import mmap
import os
from pathlib import Path
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.weight_files import WeightFiles, choose_weights, is_inside, missing_shards_advice

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class TensorFiles:
    """The tensors of a folder, from the files that `weight_files.choose_weights` chooses.

    Attributes:
      folder: path of the folder.
      shapes: shape of every tensor, by key.
      dtypes: dtype of every tensor, by key; bfloat16 is `ml_dtypes.bfloat16`.
      notes: sentences for the user about weights in the folder that are not read.
    """

    def __init__(self, folder: str | Path):
        """Opens the files and reads their headers.

        Raises:
          UserError: if there are no weights, the weights are pickled, files are damaged, or the index does not fit its
            files; lists all problems.
        """
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.notes: tuple[str, ...] = ()
        # The mapped file of every tensor, and the offset of its data.
        self._locations: dict[str, tuple[mmap.mmap, int]] = {}
        self._problems: list[str] = []
        try:
            chosen = choose_weights(self.folder)
            self.notes = chosen.notes
            self._open_all(chosen)
        except UserError as error:
            self._problems.append(str(error))
        if self._problems:
            self.close()
            raise UserError(f"{self.folder}: " + "; ".join(self._problems))

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Releases the files. Each stays mapped as long as a view into it is in use."""
        self._locations.clear()

    def read(self, key: str, index: Index = ...) -> np.ndarray:
        """Returns a tensor, or a part of it, as a read-only view into the file."""
        memory, offset = self._locations[key]
        shape = self.shapes[key]
        count = int(np.prod(shape))
        if count == 0:  # np.frombuffer does not accept an empty range at the end of the file.
            return np.empty(shape, self.dtypes[key])[index]
        return np.frombuffer(memory, self.dtypes[key], count, offset).reshape(shape)[index]

    def _open_all(self, chosen: WeightFiles) -> None:
        """Opens the chosen files, and notes problems of the files and of the index."""
        outside = [name for name in chosen.files if not is_inside(name)]
        self._problems += [f"{chosen.index} points outside the folder, to {name!r}" for name in outside]
        inside = [name for name in chosen.files if name not in outside]
        # A link without a target exists as a name; `_open` says what it is.
        missing = [name for name in inside if not os.path.lexists(self.folder / name)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            named = f", which {chosen.index} names" if chosen.index else ""
            self._problems.append(f"{names} {verb} missing{named}: {missing_shards_advice(self.folder, chosen)}")
        opened = [name for name in inside if name not in missing and self._open(name)]
        for key, name in chosen.weight_map.items():
            if name in opened and key not in self.shapes:
                self._problems.append(f"{chosen.index} says {key} is in {name}, which does not contain it")

    def _open(self, name: str) -> bool:
        """Maps a file and registers its tensors; notes problems and returns False if the file cannot be read."""
        path = self.folder / name
        try:
            # The library checks the header against the file size. The data is read through mmap below, because the
            # library would copy it.
            with safetensors.safe_open(path, framework="np"):
                pass
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            reason = describe_stub(path) or f"is damaged, truncated or not safetensors ({error}): download it again"
            self._problems.append(f"{name} {reason}")
            return False
        # Layout: 8 bytes with the length of the header, the header as JSON, and then the data.
        length = int.from_bytes(memory[:8], "little")
        for key, entry in json.loads(memory[8 : 8 + length]).items():
            if key == "__metadata__":
                continue
            if key in self.shapes:
                self._problems.append(f"{key} is in {name} and in another file as well")
            elif entry["dtype"] not in _DTYPES:
                self._problems.append(f"{key} in {name} has dtype {entry['dtype']}, which is not supported")
            else:
                self.shapes[key] = tuple(entry["shape"])
                self.dtypes[key] = np.dtype(_DTYPES[entry["dtype"]])
                self._locations[key] = memory, 8 + length + entry["data_offsets"][0]
        return True
