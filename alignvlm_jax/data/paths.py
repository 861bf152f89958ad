"""Files on this machine or in a bucket (`gs://`, `s3://`), read and written alike."""

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


def is_local(path: str | os.PathLike) -> bool:
    """Whether the path is one of this machine's."""
    return "://" not in os.fspath(path)


@dataclasses.dataclass(frozen=True)
class Status:
    """Of a file: its size, when it was last changed (0 where a bucket does not say), and whether it is one at all."""

    size: int
    changed: int
    is_regular: bool


def status(path: str | os.PathLike) -> Status:
    """What is known of a file without opening it."""
    if is_local(path):
        # Not by epath, which fails for a user id without a name: common in containers.
        local = os.stat(path)
        return Status(local.st_size, local.st_mtime_ns, stat.S_ISREG(local.st_mode))
    remote = epath.Path(path).stat()
    return Status(remote.length, remote.mtime, not remote.is_directory)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file, open for reading."""
    try:
        with epath.Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


@contextlib.contextmanager
def appearing_whole(path: epath.Path, scratch: epath.Path) -> Iterator[Path]:
    """A local file to write to that takes its name, here or in a bucket, only if all went well.

    Until then it is in the folder `scratch`, which must be on the same disk, or for a bucket in a temporary one.
    """
    with contextlib.ExitStack() as stack:
        folder = scratch if is_local(path) else stack.enter_context(tempfile.TemporaryDirectory())
        # No two writers share a name: of a run that was killed, a worker may still be at the same file.
        partial = Path(folder, f"{path.name}.{uuid.uuid4().hex}")
        try:
            yield partial
            put(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def put(source: Path, path: epath.Path) -> None:
    """Move a complete local file to its place; whoever looks there sees all of it or nothing."""
    with source.open("rb") as file:
        if is_local(path):
            os.fsync(file.fileno())  # or a power cut may leave the name on an empty file
            os.replace(source, path)
        else:
            with path.open("wb") as copy:  # which a bucket shows when it is closed
                shutil.copyfileobj(file, copy, 2**20)


def find_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """A file; the files of a folder with such endings, however deep; or those that match a pattern with `*`."""
    path = epath.Path(pattern)
    if path.is_dir():
        return sorted(str(file) for file in _files_in(path, suffixes))
    if path.exists():
        return [pattern]
    wild = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), None)
    if wild is None or "**" in path.parts:
        return []
    start = epath.Path(*path.parts[:wild]) if wild else epath.Path(".")
    return sorted(str(file) for file in start.glob("/".join(path.parts[wild:])))


def _files_in(folder: epath.Path, suffixes: tuple[str, ...]) -> Iterator[epath.Path]:
    if is_local(folder):  # os.walk does not follow links, which may lead back to the folder.
        yield from (
            epath.Path(at) / name for at, _, names in os.walk(folder) for name in names if name.endswith(suffixes)
        )
        return
    for entry in folder.iterdir():  # epath's own walk forgets the gs:// of what it finds.
        if entry.name.endswith(suffixes):
            yield entry
        elif entry.is_dir():
            yield from _files_in(entry, suffixes)
