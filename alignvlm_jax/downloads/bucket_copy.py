"""Copies files from a bucket to the local disk, for readers that need them there.

    local_copy("gs://bucket/siglip")     ~/.cache/alignvlm/buckets/siglip-5f1a0c6b

Weights are read through memory-mapped files, tokenizers and benchmarks by libraries that open paths. Each host copies
the files once: a copy of the same size and time as its object is used again, also by other processes. `XDG_CACHE_HOME`
moves the copies to another disk. They can be removed at any time.
"""

import concurrent.futures
import contextlib
import datetime
import functools
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

from alignvlm_jax.downloads import hub_models
from alignvlm_jax.errors import UserError
from alignvlm_jax.progress import progress_bar
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.storage.transfer import open_store

_FILES_AT_ONCE = 8
_LOCK = ".lock"
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
    # Copies of folders in each other are apart.
    folder = cache_folder() / f"{Path(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    with translated_errors(url):
        objects = _list(url)
    with _locked(folder, url):
        _remove_others(folder, objects)
        selected = {name: objects[name] for name in select(sorted(objects))}
        missing = {name: entry for name, entry in selected.items() if not _is_current(folder / name, entry)}
        _check_space(folder, sum(entry["size"] for entry in missing.values()), url)
        _copy_all(url, missing, folder)
    return folder


def model_folder(url: str | os.PathLike[str], *, with_weights: bool = True) -> Path:
    """Returns a local folder with a model of a bucket: the files that are read of a model on the Hub, and no others."""
    folder = local_copy(url, hub_models.small_files)
    if not with_weights:
        return folder
    return local_copy(url, lambda names: {*hub_models.small_files(names), *hub_models.weight_files(names, folder)})


def cache_folder() -> Path:
    """Returns the folder of all copies."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "")
    # The specification of this variable says to ignore relative paths.
    return (root if root.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "alignvlm" / "buckets"


def _list(url: str) -> dict[str, dict[str, Any]]:
    """Returns size and time of all objects beneath a folder, by their names relative to it."""
    files, path = open_store(url)
    try:
        found = files.find(path, detail=True)
    except FileNotFoundError:
        found = {}  # no such bucket
    objects = {name.removeprefix(path).lstrip("/"): entry for name, entry in found.items()}
    # Consoles mark folders by empty objects whose names end with a slash.
    objects = {name: entry for name, entry in objects.items() if name and not name.endswith("/")}
    if not objects:
        raise UserError(f"{url}: no such folder in the bucket, or it is empty")
    if outside := next((name for name in objects if not {"", ".", ".."}.isdisjoint(name.split("/"))), None):
        raise UserError(f"{url}/{outside}: not a name that a file can have")
    return objects


def _time(entry: dict[str, Any]) -> float:
    """Returns when an object was written, in seconds."""
    time = entry.get("mtime") or entry.get("updated") or entry.get("LastModified")
    if isinstance(time, str):
        time = datetime.datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime.datetime) else float(time or 0)


def _is_current(file: Path, entry: dict[str, Any]) -> bool:
    """Returns whether a file is the copy of this version of an object."""
    try:
        status = file.stat()
    except OSError:
        return False
    return status.st_size == entry["size"] and abs(status.st_mtime - _time(entry)) < 1e-3


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
        if file.is_file() and file.name != _LOCK and file.relative_to(folder).as_posix() not in objects:
            file.unlink(missing_ok=True)


def _check_space(folder: Path, size: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{url}: its files need {size / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: name another disk "
            "in XDG_CACHE_HOME"
        )


def _copy_all(url: str, objects: dict[str, dict[str, Any]], folder: Path) -> None:
    total = sum(entry["size"] for entry in objects.values())
    with (
        progress_bar(
            desc=f"copying {url}", total=total, unit="B", unit_scale=True, show=total >= _SHOW_FROM_BYTES
        ) as bar,
        concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
    ):
        copy = functools.partial(_copy, on_bytes=bar.update)
        copies = [pool.submit(copy, f"{url}/{name}", entry, folder / name) for name, entry in objects.items()]
        try:
            for done in concurrent.futures.as_completed(copies):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy(url: str, entry: dict[str, Any], file: Path, *, on_bytes: Callable[[int], Any]) -> None:
    """Copies an object to a file, which appears when it is complete."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files, path = open_store(url)
        with translated_errors(url):
            files.get_file(path, str(partial), callback=_progress(on_bytes))
        if partial.stat().st_size != entry["size"]:
            raise UserError(f"{url} changes while it is copied: wait until it is complete")
        os.utime(partial, (_time(entry), _time(entry)))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _progress(on_bytes: Callable[[int], Any]) -> Any:
    """Returns the object through which fsspec reports the bytes of a download."""
    from fsspec import Callback

    class Progress(Callback):
        def relative_update(self, inc: int = 1) -> None:
            on_bytes(inc)

    return Progress()
