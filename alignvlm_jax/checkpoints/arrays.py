"""Writes and reads trees of arrays in the folder of a step. The only module that uses Orbax.

    STEP/params/  STEP/opt_state/    one tree each: an OCDBT store with a zarr array for every leaf
    STEP/meta/                       JSON

Arrays are written in the background, and read as a whole or one slice at a time. They are stored in chunks of at most
`_CHUNK_BYTES`, and stacked layers are split between layers first. Reading one layer of an 8B model (`StoredTree`)
therefore reads only that layer, regardless of the mesh it was saved on.

Orbax restores damaged files as wrong numbers, without an error. The digests of `integrity.py` must therefore be
verified before anything is read here.
"""

import contextlib
import errno
import json
import os
import threading
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict

from alignvlm_jax.checkpoints import staging
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import absolute, is_bucket
from alignvlm_jax.storage.errors import translate, translated_errors

_CHUNK_BYTES = 128 * 2**20
_THREADS_TIMEOUT = 20  # seconds, for all threads of a failed write together; most need much less to end
# Errors of the disk and its folders: a save that fails with one may succeed later, or elsewhere.
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


def _orbax() -> Any:
    """Imports Orbax, which takes half a second, where it is used: not for exported models."""
    import orbax.checkpoint

    return orbax.checkpoint


class StepStore:
    """Writes steps in the background, and restores them onto any mesh.

    With several processes, all of them must make the same calls.
    """

    def __init__(self):
        self._orbax = _make_orbax()
        self._staged: Path | None = None  # the step that is still to be uploaded

    def save(self, step: Path, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to write each tree, and `meta` as JSON, into its own folder in `step`."""
        # Orbax returns once the arrays are copied to the host, so the caller may donate them to the next step.
        args = {name: _save_in_chunks(tree) for name, tree in trees.items()}
        if staging.is_staged(step):
            if jax.process_index() == 0:
                staging.clear(step)
            self._staged, step = step, staging.staging_folder(step)
        self._orbax.save(step, args=_orbax().args.Composite(**args, meta=_orbax().args.JsonSave(dict(meta))))

    def wait(self) -> None:
        """Waits until everything is written; raises the error of a write that failed."""
        self._orbax.wait_until_finished()
        if self._staged is not None:
            step, self._staged = self._staged, None
            staging.upload(step)

    def restore(self, step: Path, **abstract: Any) -> Any:
        """Returns the trees of a step as attributes of one object.

        Args:
          step: folder of the step.
          **abstract: shapes, dtypes and shardings of each tree to restore, by its name.
        """
        if staging.is_staged(step):
            return types.SimpleNamespace(**{name: _read_tree(step / name, tree) for name, tree in abstract.items()})
        args = _orbax().args.Composite(**{name: _restore_into(tree) for name, tree in abstract.items()})
        return self._orbax.restore(step, args=args)

    def reset(self) -> None:
        """Makes the store usable again after a failed write, once nothing of that write is still running."""
        # Orbax reports the first error while its other threads still write, for instance into a folder that the caller
        # is about to delete. A thread that is cancelled before it begins writes nothing, but may wait for ten minutes
        # for one that has failed.
        threads = [each for each in threading.enumerate() if type(each).__module__.startswith("orbax.")]
        for thread in threads:
            with contextlib.suppress(RuntimeError, AttributeError):  # it has just ended, or cannot be cancelled
                thread.cancel()
        deadline = time.monotonic() + _THREADS_TIMEOUT
        for thread in threads:
            with contextlib.suppress(Exception):  # its `join` raises the error of the thread
                thread.join(max(deadline - time.monotonic(), 0.0))
        # Orbax keeps the errors of its threads, and would raise them again at the next save.
        self._orbax = _make_orbax()

    def close(self) -> None:
        """Waits for the threads that write, and ends them."""
        self._orbax.close()


def unfinished_folders(checkpoints: Path) -> list[Path]:
    """Returns the folders of steps that Orbax did not finish writing. In a bucket they have no name of their own."""
    return [] if is_bucket(checkpoints) else list(checkpoints.glob("*.orbax-checkpoint-tmp*"))


def unfinished_folder(step: Path) -> Path:
    """Returns the name that the folder of a step has while Orbax writes it."""
    return step.with_name(f"{step.name}.orbax-checkpoint-tmp")


def restore_tree(folder: Path, abstract: Any) -> Any:
    """Returns the tree in `folder`, with the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: if it cannot be read.
    """
    folder = absolute(folder)
    if staging.is_staged(folder):
        return _read_tree(folder, abstract)
    try:
        with _orbax().Checkpointer(_orbax().StandardCheckpointHandler()) as reader:
            return reader.restore(folder, args=_orbax().args.StandardRestore(abstract))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error


class StoredTree:
    """Reads a tree on disk one slice at a time into host memory, regardless of the mesh it was saved on.

    Attributes:
      shapes: shape of every array, by its path ("language/layers/mlp/gate/kernel").
      dtypes: dtype of every array, by its path.
    """

    def __init__(self, folder: Path):
        self._folder, self._context = absolute(folder), _make_context()
        if staging.is_staged(folder):
            arrays = {name: self._open(name) for name in _stored_names(folder)}
            self.shapes = {name: array.shape for name, array in arrays.items()}
            self.dtypes = {name: array.dtype.numpy_dtype for name, array in arrays.items()}
            return
        try:
            # Calls the handler directly: a `Checkpointer` would look for metadata of the whole step, and warn.
            from etils import epath

            tree = _orbax().PyTreeCheckpointHandler().metadata(epath.Path(self._folder)).tree
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._folder} cannot be read: {str(error).splitlines()[0]}") from error
        leaves = {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
        self.shapes: dict[str, tuple[int, ...]] = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        self.dtypes: dict[str, np.dtype] = {path: jnp.dtype(leaf.dtype) for path, leaf in leaves.items()}

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Returns one array, or the part of it that `index` selects.

        For example, `read("language/layers/mlp/gate/kernel", (3,))` reads the kernel of layer 3.

        Raises:
          UserError: if the array cannot be read.
        """
        try:
            return self._open(path)[(*index, ...)].read().result()
        except ValueError as error:
            raise UserError(f"{self._folder}: {path} cannot be read: {error}") from error

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of an array's chunks, which are the smallest parts that can be read."""
        return tuple(self._open(path).chunk_layout.read_chunk.shape)

    def _open(self, path: str) -> tensorstore.TensorStore:
        return _open_array(self._folder, path, self._context).result()


def storage_error_message(error: Exception) -> str | None:
    """Returns a message if the disk or the bucket caused the error, or None for a bug, which must be raised."""
    if of_bucket := translate(error):
        return str(of_bucket)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    # tensorstore raises a ValueError that contains the system's message.
    message = next((text for number in _STORAGE_ERRORS if (text := os.strerror(number)) in str(error)), None)
    return str(error) if message is None and isinstance(error, OSError) else message


def base_store(folder: Path) -> dict[str, Any]:
    """Returns TensorStore's description of a folder."""
    if not is_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    scheme, _, name = str(folder).partition("://")
    bucket, _, key = name.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    store = {"driver": "s3", "bucket": bucket, "path": f"{key}/"}
    # TensorStore finds credentials like other clients, but reads neither of these from the environment.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        store |= {"endpoint": endpoint, "aws_region": region}
    return store


def _make_context() -> tensorstore.Context:
    # Not for longer than a tree is read, because another run may write a step of the same name.
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": 10**8}})


def _open_array(folder: Path, path: str, context: tensorstore.Context) -> tensorstore.Future:
    # Orbax's layout: an OCDBT store whose folders are zarr arrays, named by the array's path with dots.
    store = {"driver": "ocdbt", "base": base_store(folder), "path": path.replace("/", ".")}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True, open=True, context=context)


def _stored_names(folder: Path) -> list[str]:
    """Returns the paths of the arrays in a tree, as Orbax recorded them."""
    with translated_errors(str(folder)):
        recorded = json.loads((folder / "_METADATA").read_bytes())["tree_metadata"].values()
    return ["/".join(key["key"] for key in entry["key_metadata"]) for entry in recorded]


def _read_tree(folder: Path, abstract: Any) -> Any:
    """Returns a tree in a bucket that Orbax cannot read. Each process reads the parts that its devices hold.

    Raises:
      UserError: if it cannot be read.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    context = _make_context()
    try:
        arrays = [_open_array(folder, "/".join(map(_key_name, path)), context) for path, _ in leaves]
        # All reads are in progress at once, but TensorStore limits how many requests it makes at the same time.
        restored = [
            _read_array(array.result(), leaf, leaf.sharding) for array, (_, leaf) in zip(arrays, leaves, strict=True)
        ]
    except ValueError as error:
        raise translate(error, str(folder)) or UserError(
            f"{folder} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return jax.tree.unflatten(structure, [make() for make in restored])


def _read_array(stored: tensorstore.TensorStore, leaf: Any, sharding: jax.sharding.Sharding) -> Callable[[], jax.Array]:
    """Starts to read the parts of an array that this process holds; returns a function that waits for them."""
    if tuple(stored.shape) != tuple(leaf.shape):
        raise ValueError(f"expected an array of shape {tuple(leaf.shape)}, got {tuple(stored.shape)}")
    indices = sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {str(index): stored[index].read() for index in indices}

    def make() -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: np.asarray(parts[str(index)].result()).astype(leaf.dtype)
        )

    return make


def _key_name(key: Any) -> str:
    """Returns Orbax's name of a key in the path of a leaf."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _make_orbax() -> Any:
    # With folders created in the background, Orbax's threads would wait forever for one that cannot be created.
    options = _orbax().options.AsyncOptions(create_directories_asynchronously=False)
    return _orbax().AsyncCheckpointer(_orbax().CompositeCheckpointHandler(), async_options=options)


def _save_in_chunks(tree: Any) -> Any:
    def arguments(path, leaf):
        del leaf
        # Axis 0 of stacked layers is the layer: chunks are split along it first, so that one layer can be read alone.
        is_stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return _orbax().SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if is_stacked else ())

    save_args = jax.tree_util.tree_map_with_path(arguments, tree)
    # Data stay in memory until a file is full, and a file holds 2 GB by default: smaller files need less memory.
    return _orbax().args.PyTreeSave(tree, save_args=save_args, ocdbt_target_data_file_size=2 * _CHUNK_BYTES)


def _restore_into(abstract: Any) -> Any:
    # StandardRestore does the same, but a checkpointer that has used it saves only with StandardSave from then on.
    return _orbax().args.PyTreeRestore(
        abstract, restore_args=_orbax().checkpoint_utils.construct_restore_args(abstract)
    )
