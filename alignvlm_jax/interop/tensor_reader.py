"""Reads the tensors of a Hugging Face folder lazily, from memory-mapped safetensors files.

    with TensorFiles("llama/") as files:
        files.shapes["model.norm.weight"]                 # known without reading any data
        files.read("model.embed_tokens.weight", 17)       # one row: reads only its pages

`read` returns a view into the file. Slicing or transposing the view reads no data, and copying a part of it reads only
that part. A tensor itself never takes up memory; only copies of it do.
"""

import json
import mmap
import shlex
from pathlib import Path
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from alignvlm_jax.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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

# The conversion command for pickled weights. weights_only prevents torch from running code in the pickle. The clones
# separate tensors that share memory, which safetensors refuses.
_CONVERT = (
    "import glob, sys, torch, safetensors.torch as s; d = sys.argv[1]; "
    "s.save_file({k: v.clone().contiguous() for f in sorted(glob.glob(d + '/pytorch_model*.bin')) "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}, "
    f"d + '/{WEIGHTS_FILE}', metadata={{'format': 'pt'}})"
)

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


class TensorFiles:
    """The tensors of a folder: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Attributes:
      folder: path of the folder.
      shapes: shape of every tensor, by key.
      dtypes: dtype of every tensor, by key; bfloat16 is `ml_dtypes.bfloat16`.
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
        # The mapped file of every tensor, and the offset of its data.
        self._locations: dict[str, tuple[mmap.mmap, int]] = {}
        self._problems: list[str] = []
        if (self.folder / WEIGHTS_FILE).is_file():
            self._open(WEIGHTS_FILE)
        elif (self.folder / INDEX_FILE).is_file():
            self._open_shards()
        else:
            self._problems.append(_describe_missing_weights(self.folder))
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

    def _open_shards(self) -> None:
        """Opens the files that the index names, and notes problems of the index."""
        try:
            weight_map = json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
            if not all(isinstance(shard, str) for shard in shards):
                raise TypeError("a shard's name must be text")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._problems.append(f"{INDEX_FILE} is not an index of safetensors ({type(error).__name__}: {error})")
            return
        opened = [shard for shard in shards if self._is_inside(shard) and self._open(shard)]
        for key, shard in weight_map.items():
            if shard in opened and key not in self.shapes:
                self._problems.append(f"{INDEX_FILE} says {key} is in {shard}, which does not contain it")

    def _is_inside(self, shard: str) -> bool:
        """Returns whether a file named by the index is in this folder, with links resolved; notes a problem if not."""
        folder, path = self.folder.resolve(), (self.folder / shard).resolve()
        # The cache of huggingface_hub links snapshots/REVISION/* to blobs/*, two folders up.
        in_cache = folder.parent.name == "snapshots" and path.parent == folder.parent.parent / "blobs"
        if Path(shard).is_absolute() or ".." in Path(shard).parts or not (path.is_relative_to(folder) or in_cache):
            self._problems.append(f"{INDEX_FILE} points outside the folder, to {shard!r} ({path})")
            return False
        return True

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
        except FileNotFoundError:
            self._problems.append(f"{name} is missing")
            return False
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            self._problems.append(f"{name} is damaged, truncated or not safetensors ({error}): download it again")
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


def _describe_missing_weights(folder: Path) -> str:
    """Returns an error message for a folder without safetensors, with a command that converts pickled weights."""
    if not folder.is_dir():
        return "no such folder"
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not pickled:
        return f"no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return (
        f"the weights are pickled ({pickled[0]}), and reading a pickle can run code of its author; "
        f"on a machine with torch, convert them with: python -c {shlex.quote(_CONVERT)} {shlex.quote(str(folder))}"
    )
