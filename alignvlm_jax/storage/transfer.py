"""Writes files to a bucket from the local disk."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignvlm_jax.locations import is_local, location
from alignvlm_jax.storage.errors import translated_errors


def upload(file: Path, target: str | os.PathLike[str]) -> None:
    """Copies a file into a bucket, where it appears when it is complete."""
    with translated_errors(os.fspath(target)):
        store, path = open_store(target)
        store.put_file(os.fspath(file), path)


def folder_size(folder: str | os.PathLike[str]) -> int:
    """Returns the size of the files in a folder, in bytes, on a disk or in a bucket."""
    if is_local(folder):
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    with translated_errors(os.fspath(folder)):
        store, path = open_store(folder)
        return store.du(path)


def open_store(url: str | os.PathLike[str]) -> tuple[Any, str]:
    """Returns fsspec's file system of a bucket, and the path of a location in it."""
    parsed = location(url)
    from fsspec.core import url_to_fs  # takes 0.5 s, which only buckets need

    return url_to_fs(parsed)


@contextlib.contextmanager
def local_file(target: Path) -> Iterator[Path]:
    """Yields a path on the local disk to write a file to: `target`, or one that is uploaded there afterwards."""
    if is_local(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="alignvlm_") as folder:
        file = Path(folder, target.name)
        yield file
        upload(file, target)
