"""The files of a step as `integrity.py` sees them: on a disk, or in a bucket.

On a disk, a file is recorded with its SHA-256, for which it is read once. In a bucket, an object is recorded with the
checksum and the version that the store keeps of it, which one list returns for all objects: nothing is read.

    disk:    {"bytes": 114, "sha256": "e3b0..."}
    GCS:     {"bytes": 114, "md5": "1B2M...", "crc32c": "AAAA...", "version": "1796077977025869"}
    S3:      {"bytes": 114, "etag": "d41d...", "version": "d41d..."}

Each kind also checks the records of the other, so a run may be copied from a disk to a bucket and back. An object of
another version with the same checksum is such a copy.
"""

import base64
import concurrent.futures
import errno
import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_bucket
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.storage.objects import StoredObject, delete_folder, list_objects

_THREADS = 4  # hashlib releases the GIL, so each thread keeps one core busy

_PROCESS = re.compile(r"process_(\d+)")

Record = dict[str, Any]
"""Size, checksum and version of a file."""


class StepFiles(Protocol):
    """The files of one step. Names are paths in its folder, with slashes."""

    def names(self) -> list[str]:
        """Returns the names of all files."""

    def matching(self, pattern: str) -> list[str]:
        """Returns the names of the files in the step's folder itself that match a pattern."""

    def read(self, name: str) -> bytes:
        """Returns the content of a file."""

    def size(self, name: str) -> int | None:
        """Returns the size of a file, or None if it does not exist."""

    def identity(self, name: str) -> str:
        """Returns a text that changes when a file is written again."""

    def record(self, names: Sequence[str]) -> dict[str, Record]:
        """Returns the records of files, once they would survive a power failure."""

    def is_unchanged(self, name: str, record: Mapping[str, Any]) -> bool:
        """Returns whether the content of a file is the recorded one. Its size is known to be."""

    def write_last(self, name: str, text: str) -> None:
        """Writes the file that makes the others count."""


def step_files(step: Path) -> StepFiles:
    """Returns the files of a step."""
    return _BucketFiles(step) if is_bucket(step) else _DiskFiles(step)


def writer_of(name: str) -> int:
    """Returns the index of the process that wrote a file."""
    # Orbax writes one folder per process; process 0 writes all other files.
    processes = [match for part in name.split("/") if (match := _PROCESS.search(part))]
    return int(processes[0][1]) if processes else 0


def remove_folder(folder: Path, *, first: str) -> None:
    """Deletes a folder: first the files whose names match a pattern, then all others.

    Raises:
      OSError, UserError: if the first files cannot be deleted, or any object of a bucket.
    """
    with translated_errors(str(folder)):
        for path in folder.glob(first):
            path.unlink(missing_ok=True)
    if is_bucket(folder):
        delete_folder(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


class _DiskFiles:
    def __init__(self, step: Path):
        self._step = step

    def names(self) -> list[str]:
        return [path.relative_to(self._step).as_posix() for path in self._step.rglob("*") if path.is_file()]

    def matching(self, pattern: str) -> list[str]:
        return [path.name for path in self._step.glob(pattern)]

    def read(self, name: str) -> bytes:
        return (self._step / name).read_bytes()

    def size(self, name: str) -> int | None:
        path = self._step / name
        return path.stat().st_size if path.is_file() else None

    def identity(self, name: str) -> str:
        return str((self._step / name).stat().st_mtime_ns)

    def record(self, names: Sequence[str]) -> dict[str, Record]:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda name: _digest(self._step / name, "sha256", sync=True).hex(), names)
            records = {
                name: {"bytes": (self._step / name).stat().st_size, "sha256": digest}
                for name, digest in zip(names, digests, strict=True)
            }
        # Syncing a file does not sync its name, which is an entry of its folder.
        folders = {parent for name in names for parent in Path(name).parents}
        for folder in {self._step.parent, *(self._step / folder for folder in folders)}:
            _sync(folder)
        return records

    def is_unchanged(self, name: str, record: Mapping[str, Any]) -> bool:
        return _has_content(self._step / name, record)

    def write_last(self, name: str, text: str) -> None:
        path = self._step / name
        path.write_text(text, encoding="utf-8")
        _sync(path)
        _sync(self._step)


class _BucketFiles:
    def __init__(self, step: Path):
        self._step = step
        self._objects: dict[str, StoredObject] = list_objects(step)

    def names(self) -> list[str]:
        return list(self._objects)

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self._objects if "/" not in name and fnmatch.fnmatchcase(name, pattern)]

    def read(self, name: str) -> bytes:
        with translated_errors(str(self._step)):
            return (self._step / name).read_bytes()

    def size(self, name: str) -> int | None:
        return self._objects[name].size if name in self._objects else None

    def identity(self, name: str) -> str:
        return self._objects[name].version

    def record(self, names: Sequence[str]) -> dict[str, Record]:
        # An object that is listed is durable.
        found = {name: self._objects[name] for name in names}
        return {name: {"bytes": one.size, **one.checksum, "version": one.version} for name, one in found.items()}

    def is_unchanged(self, name: str, record: Mapping[str, Any]) -> bool:
        found = self._objects[name]
        if record.get("version") == found.version:
            return True
        # CRC-32C alone does not tell: it is the same for all files that end with their own, as those of OCDBT do.
        for algorithm in ("md5", "etag"):
            checksums = record.get(algorithm, "-"), found.checksum.get(algorithm, "-")
            # The ETag of an object that was uploaded in parts has a dash, and depends on the size of the parts.
            if not any("-" in checksum for checksum in checksums):
                return checksums[0] == checksums[1]
        with translated_errors(str(self._step)):
            return _has_content(self._step / name, record)

    def write_last(self, name: str, text: str) -> None:
        with translated_errors(str(self._step)):
            (self._step / name).write_text(text)


def _has_content(path: Path, record: Mapping[str, Any]) -> bool:
    """Returns whether a file has the recorded content, for which it is read."""
    if "sha256" in record:
        return _digest(path, "sha256").hex() == record["sha256"]
    if "md5" in record:
        return base64.b64encode(_digest(path, "md5")).decode() == record["md5"]
    if "etag" in record and "-" not in record["etag"]:  # of an object that was uploaded in one part
        return _digest(path, "md5").hex() == record["etag"]
    raise UserError(f"{path}: its checksum can only be compared in the bucket that it was written to")


def _digest(path: Path, algorithm: str, sync: bool = False) -> bytes:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        if not is_bucket(path):
            return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).digest()
        digest = hashlib.new(algorithm, usedforsecurity=False)
        while block := file.read(2**22):
            digest.update(block)
        return digest.digest()


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are physically on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
