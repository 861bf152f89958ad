"""Access to files on the local machine or in a bucket (`gs://`, `s3://`)."""

import contextlib
import dataclasses
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_local


@dataclasses.dataclass(frozen=True)
class Status:
    """Metadata of a file.

    Attributes:
      size: size in bytes.
      changed: time of the last change; 0 if a bucket does not report it.
      is_regular: whether the path is a regular file.
    """

    size: int
    changed: int
    is_regular: bool


def status(path: str | os.PathLike) -> Status:
    """Returns the metadata of a file without opening it."""
    if is_local(path):
        # epath's stat() fails for a user id without a name, which is common in containers.
        local = os.stat(path)
        return Status(local.st_size, local.st_mtime_ns, stat.S_ISREG(local.st_mode))
    remote = epath.Path(path).stat()
    return Status(remote.length, remote.mtime, not remote.is_directory)


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading."""
    try:
        with epath.Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


@contextlib.contextmanager
def atomic_file(path: epath.Path, scratch: epath.Path) -> Iterator[Path]:
    """Yields a local file to write to, which gets its final name, local or in a bucket, only if no error occurs.

    Until then it is in the folder `scratch`, which must be on the same disk; a bucket uses a temporary folder.
    """
    with contextlib.ExitStack() as stack:
        folder = scratch if is_local(path) else stack.enter_context(tempfile.TemporaryDirectory())
        # Names are unique, because a worker of a killed run may still be writing the same file.
        partial = Path(folder, f"{path.name}.{uuid.uuid4().hex}")
        try:
            yield partial
            move_into_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def move_into_place(source: Path, path: epath.Path) -> None:
    """Moves a complete local file to its final place, where it appears at once and complete."""
    with source.open("rb") as file:
        if is_local(path):
            # Without fsync, a power failure may leave the final name on an empty file.
            os.fsync(file.fileno())
            os.replace(source, path)
        else:
            # A bucket shows a file only when it is closed.
            with path.open("wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)


def find_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns the files that `pattern` names, in order.

    The pattern is a file, a folder (all files below it that end with one of `suffixes`, in small or capital letters),
    or a path with `*`, `?` or `[...]` in it.
    """
    path = epath.Path(pattern)
    if path.is_dir():
        return sorted(str(file) for file in _files_in(path, suffixes))
    if path.exists():
        return [pattern]
    first_wildcard = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), None)
    if first_wildcard is None or "**" in path.parts:
        return []
    # Glob below the longest folder without wildcards.
    start = epath.Path(*path.parts[:first_wildcard]) if first_wildcard else epath.Path(".")
    return sorted(str(file) for file in start.glob("/".join(path.parts[first_wildcard:])))


def _files_in(folder: epath.Path, suffixes: tuple[str, ...]) -> Iterator[epath.Path]:
    """Yields the files at any depth of a folder that end with one of `suffixes`."""
    if is_local(folder):  # os.walk does not follow links, which may lead back to the folder.
        yield from (
            epath.Path(parent) / name
            for parent, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(suffixes)
        )
        return
    for entry in folder.iterdir():  # epath's own walk() drops the gs:// of the paths it returns.
        if entry.name.lower().endswith(suffixes):
            yield entry
        elif entry.is_dir():
            yield from _files_in(entry, suffixes)
