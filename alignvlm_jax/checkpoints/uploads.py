"""Checks that the objects of a step arrived in their bucket as a whole, before the step is sealed.

The store's checksums describe what arrived. An object that was truncated during the upload is recorded with its wrong
size, and noticed only when TensorStore or a JSON parser reads it. Therefore the index of each tree is read: a
manifest and the nodes of a B-tree. They name the file, the offset and the length of every chunk. No file may be shorter
than the index says. Arrays are not read.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import tensorstore

from alignvlm_jax.checkpoints.arrays import base_store
from alignvlm_jax.errors import TemporaryError
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.storage.objects import list_objects

_MANIFEST = "manifest.ocdbt"
_JSON = ("_METADATA", "metadata", "_CHECKPOINT_METADATA")


def check(step: Path) -> None:
    """Checks a step in a bucket whose processes have written everything but the seal.

    Raises:
      TemporaryError: if an object is too short, and the step must be saved again.
    """
    sizes = {name: stored.size for name, stored in list_objects(step).items()}
    for name in sorted(sizes):
        folder, _, file = name.rpartition("/")
        try:
            if file in _JSON:
                with translated_errors(str(step)):
                    json.loads((step / name).read_bytes())
            # The processes' own trees are parts of the tree in the folder above.
            elif file == _MANIFEST and "/" not in folder:
                own = {path.removeprefix(f"{folder}/"): size for path, size in sizes.items()}
                if truncated := next(_truncated_files(step / folder, own), None):
                    raise ValueError(f"{folder}/{truncated} is too short")
        except ValueError as error:
            raise TemporaryError(f"{step / name}: an upload arrived incomplete ({error})") from error


def _truncated_files(folder: Path, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yields the files of a tree that are shorter than its index says, as paths in its folder."""
    store = tensorstore.KvStore.open(base_store(folder)).result()
    pending = [tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    while pending:
        location = pending.pop()
        # "value:ocdbt.process_0/:d/2caca0ac:128:4096": kind, base path, path, offset and length.
        kind, _, rest = location.partition(":")
        path, offset, length = rest.rsplit(":", 2)
        file = path.replace(":", "", 1)
        if int(offset) + int(length) > sizes.get(file, 0):
            yield file
        elif kind == "btreenode":
            entries = tensorstore.ocdbt.dump(store, location).result()["entries"]
            # Small values are in the node itself.
            pending += [found for entry in entries if (found := entry.get("indirect_value") or entry.get("location"))]
