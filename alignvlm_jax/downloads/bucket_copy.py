"""Copies files from a bucket to the local disk, for readers that need them there.

    local_copy("gs://bucket/siglip")     ~/.cache/alignvlm/buckets/siglip-5f1a0c6b

Weights are read through memory-mapped files, tokenizers and benchmarks by libraries that open paths. Each host copies
the files once: `.versions.json` states which version of its object each file is, and the copy of the newest version is
used again, also by other processes. `XDG_CACHE_HOME` moves the copies to another disk. They can be removed at any time.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from alignvlm_jax.downloads import hub_models
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import user_cache_folder
from alignvlm_jax.output_files import write_atomically
from alignvlm_jax.progress import progress_bar
from alignvlm_jax.storage.clients import file_system
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.storage.objects import StoredObject, list_objects

_FILES_AT_ONCE = 8
_LOCK, _VERSIONS = ".lock", ".versions.json"
_SHOW_FROM_BYTES = 2**27


def local_copy(url: str | os.PathLike[str], select: Callable[[Collection[str]], Iterable[str]] = list) -> Path:
    """Returns a local folder with files of a folder in a bucket, and copies those that are not there yet.

    Args:
      url: the folder in the bucket.
      select: returns the names of the files to copy, given the names of all files, relative to the folder.

    Raises:
      TemporaryError: if the store does not answer.
      UserError: if there is no such folder, it cannot be read, or the disk has too little space.
    """
    url = os.fspath(url)
    # The hash separates folders of the same name, and a folder from one inside it.
    folder = cache_folder() / f"{Path(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    objects = _list(url)
    with _locked(folder, url):
        _remove_others(folder, objects)
        versions = _read_versions(folder)
        selected = {name: objects[name] for name in select(sorted(objects))}
        missing = {
            name: entry
            for name, entry in selected.items()
            if versions.get(name) != entry.version or not (folder / name).is_file()
        }
        _check_space(folder, sum(entry.size for entry in missing.values()), url)
        _copy_all(url, missing, folder, versions)
    return folder


def model_folder(url: str | os.PathLike[str], *, with_weights: bool = True) -> Path:
    """Returns a local folder with a model of a bucket: the files that are read of a model on the Hub, and no others."""
    folder = local_copy(url, hub_models.small_files)
    if not with_weights:
        return folder
    return local_copy(url, lambda names: {*hub_models.small_files(names), *hub_models.weight_files(names, folder)})


def cache_folder() -> Path:
    """Returns the folder of all copies."""
    return user_cache_folder() / "buckets"


def _list(url: str) -> dict[str, StoredObject]:
    """Returns all objects beneath a folder, by their names relative to it."""
    try:
        objects = list_objects(url)
    except FileNotFoundError:
        objects = {}  # no such bucket
    if not objects:
        raise UserError(f"{url}: no such folder in the bucket, or it is empty")
    if outside := next((name for name in objects if not {"", ".", ".."}.isdisjoint(name.split("/"))), None):
        raise UserError(f"{url}/{outside}: not a name that a file can have")
    return objects


def _read_versions(folder: Path) -> dict[str, str]:
    """Returns the version of each copied object."""
    try:
        return json.loads((folder / _VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def _locked(folder: Path, url: str) -> Iterator[None]:
    """Holds the folder, so that only one process of this host copies. The others wait, and find the files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / _LOCK)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{url} cannot be copied to {folder} ({error.strerror or error}): name another disk in XDG_CACHE_HOME"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_others(folder: Path, objects: Collection[str]) -> None:
    """Removes copies of objects that no longer exist, and what a killed process left."""
    for file in list(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in (_LOCK, _VERSIONS) and name not in objects:
            file.unlink(missing_ok=True)


def _check_space(folder: Path, size: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{url}: its files need {size / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: name another disk "
            "in XDG_CACHE_HOME"
        )


def _copy_all(url: str, objects: Mapping[str, StoredObject], folder: Path, versions: dict[str, str]) -> None:
    """Copies objects, and adds their versions to those that are recorded."""
    total = sum(entry.size for entry in objects.values())
    show = total >= _SHOW_FROM_BYTES
    with (
        progress_bar(desc=f"copying {url}", total=total, unit="B", unit_scale=True, show=show) as bar,
        concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
    ):
        copies = {
            pool.submit(_copy, f"{url}/{name}", entry.size, folder / name, on_bytes=bar.update): name
            for name, entry in objects.items()
        }
        try:
            for done in concurrent.futures.as_completed(copies):
                done.result()
                name = copies[done]
                versions[name] = objects[name].version
                write_atomically(folder / _VERSIONS, json.dumps(versions).encode())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy(url: str, size: int, file: Path, *, on_bytes: Callable[[int], Any]) -> None:
    """Copies an object to a file, which appears when it is complete."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with translated_errors(url):
            file_system(url).get_file(url, str(partial), callback=_progress_class()(on_bytes))
        if partial.stat().st_size != size:
            raise UserError(f"{url} changes while it is copied: wait until it is complete")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def _progress_class() -> type:
    """Returns the class through which fsspec reports the bytes of a download."""
    from fsspec import Callback

    class Progress(Callback):
        def __init__(self, on_bytes: Callable[[int], Any]):
            super().__init__()
            self._on_bytes = on_bytes

        def relative_update(self, inc: int = 1) -> None:
            self._on_bytes(inc)

    return Progress
