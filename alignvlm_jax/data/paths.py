"""Access to files on the local machine or in a bucket (`gs://`, `s3://`)."""

import contextlib
import dataclasses
import io
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_local, open_location
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.storage.transfer import upload


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
    """Opens a file for reading.

    Raises:
      TemporaryError: if the bucket does not answer, also while the file is read.
      UserError: if the file cannot be opened.
    """
    if is_local(path):
        try:
            with open(path, "rb") as file:
                yield file
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        return
    try:
        with translated_errors(path):
            stream = open_location(path).open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    with stream, io.BufferedReader(_BucketStream(stream, path), 2**20) as file:
        yield file


class _BucketStream(io.RawIOBase):
    """Reads an object. Readers take an OSError for damage of the file, so one of the network must be another error."""

    def __init__(self, stream: BinaryIO, path: str):
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position."""
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        """Reads some bytes."""
        with translated_errors(self._path):
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


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
            upload(source, path)


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
