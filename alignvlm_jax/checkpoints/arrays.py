"""All of Orbax: trees of arrays in the folder of a step, written in the background, read whole or a slice at a time.

    STEP/params/  STEP/opt_state/    a tree each: an OCDBT store with a zarr array for every leaf
    STEP/meta/                       JSON

Arrays are stored in chunks of at most `_CHUNK_BYTES`, stacked layers cut between layers first: whoever wants one layer
of an 8B model (`StoredTree`) reads that layer, on whatever mesh it was saved. Orbax restores damaged files as other
numbers without a word: whether they are what was written is for `integrity.py` to say, before anything is read here.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import flatten_dict

from alignvlm_jax.errors import UserError

_CHUNK_BYTES = 128 * 2**20
_STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
)


class StepStore:
    """Writes steps in the background, and reads them back onto any mesh. With several processes all call it alike."""

    def __init__(self):
        self._orbax = _make_orbax()

    def save(self, step: Path, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Begins to write each tree, and `meta` as JSON, into a folder of its own in `step`."""
        args = {name: _save_in_chunks(tree) for name, tree in trees.items()}
        self._orbax.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(dict(meta))))

    def wait(self) -> None:
        """Until all is written; raises what went wrong meanwhile."""
        self._orbax.wait_until_finished()

    def restore(self, step: Path, **abstract: Any) -> Any:
        """The trees of these names, as attributes, with the shapes, dtypes and shardings of `abstract`."""
        args = ocp.args.Composite(**{name: _restore_into(tree) for name, tree in abstract.items()})
        return self._orbax.restore(step, args=args)

    def start_again(self) -> None:
        """After a failure: Orbax keeps errors of its threads, and would raise them again with the next save."""
        self._orbax = _make_orbax()

    def close(self) -> None:
        """Ends its threads, once they are done."""
        self._orbax.close()


def remnants(checkpoints: Path) -> list[Path]:
    """What Orbax was writing in a folder of checkpoints and did not finish."""
    return list(checkpoints.glob("*.orbax-checkpoint-tmp*"))


def remnant(step: Path) -> Path:
    """What there is of a step while Orbax writes it."""
    return Path(f"{step}.orbax-checkpoint-tmp")


def restore_tree(folder: Path, abstract: Any) -> Any:
    """The tree in `folder`, with the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: it cannot be read.
    """
    folder = folder.absolute()
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.restore(folder, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error


class StoredTree:
    """A tree on disk, whatever mesh saved it, a slice at a time on the host.

    Attributes:
      shapes, dtypes: of every array, by its path ("language/layers/mlp/gate/kernel").
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        try:
            # Asked directly: a `Checkpointer` looks for metadata of the whole step in here, and warns.
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self._folder)).tree
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._folder} cannot be read: {str(error).splitlines()[0]}") from error
        leaves = {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
        self.shapes: dict[str, tuple[int, ...]] = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        self.dtypes: dict[str, np.dtype] = {path: jnp.dtype(leaf.dtype) for path, leaf in leaves.items()}

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """One array, or the part of it that `index` names; `read("language/layers/mlp/gate/kernel", (3,))`.

        Raises:
          UserError: its bytes cannot be read.
        """
        try:
            return self._open(path)[(*index, ...)].read().result()
        except ValueError as error:
            raise UserError(f"{self._folder}: {path} cannot be read: {error}") from error

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """The pieces an array is stored in: what has to be read at least."""
        return tuple(self._open(path).chunk_layout.read_chunk.shape)

    def _open(self, path: str) -> tensorstore.TensorStore:
        # Orbax's layout: an OCDBT store whose folders are zarr arrays, named by the array's path with dots.
        base = {"driver": "file", "path": f"{self._folder}/"}
        store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".")}
        return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True, open=True).result()


def storage_words(error: Exception) -> str | None:
    """What the system said, if it is the disk's fault; anything else is a mistake here and must show itself.

    tensorstore reports the disk's troubles as a ValueError with the system's words in it.
    """
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    found = next((words for number in _STORAGE_ERRORS if (words := os.strerror(number)) in str(error)), None)
    return str(error) if found is None and isinstance(error, OSError) else found


def _make_orbax() -> ocp.AsyncCheckpointer:
    # Folders made in the background would have its threads wait for one that cannot be made.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def _save_in_chunks(tree: Any) -> ocp.args.PyTreeSave:
    def arguments(path, leaf):
        del leaf
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    save_args = jax.tree_util.tree_map_with_path(arguments, tree)
    # What is written stays in memory until a file is full, 2 GB of it by default.
    return ocp.args.PyTreeSave(tree, save_args=save_args, ocdbt_target_data_file_size=2 * _CHUNK_BYTES)


def _restore_into(abstract: Any) -> ocp.args.PyTreeRestore:
    # StandardRestore does just this, but its manager then refuses to save by anything but StandardSave.
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
