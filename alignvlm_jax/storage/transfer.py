"""Writes files to a bucket from the local disk."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax.locations import is_local
from alignvlm_jax.storage.clients import file_system
from alignvlm_jax.storage.errors import translated_errors


def upload(file: Path, target: str | os.PathLike[str]) -> None:
    """Copies a file into a bucket, where it appears when it is complete."""
    with translated_errors(os.fspath(target)):
        file_system(target).put_file(os.fspath(file), os.fspath(target))


def folder_size(folder: str | os.PathLike[str]) -> int:
    """Returns the size of the files in a folder, in bytes, on a disk or in a bucket."""
    if is_local(folder):
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    with translated_errors(os.fspath(folder)):
        return file_system(folder).du(os.fspath(folder))


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
