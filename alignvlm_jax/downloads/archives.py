"""Unpacks an archive that is published in parts: `cat imgs-* | tar -xz`, without the file in between."""

import io
import shutil
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from alignvlm_jax.errors import UserError
from alignvlm_jax.progress import progress_bar


def unpack_parts(parts: Sequence[Path], folder: Path, *, is_quiet: bool = False) -> None:
    """Unpacks an archive next to its parts. If the folder exists, it does nothing.

    Several processes may call it: one unpacks, and the others wait. The folder appears when it is complete.

    Args:
      parts: the parts of a tar archive, compressed or not, in order.
      folder: the folder that the archive contains.
      is_quiet: whether to show no progress.

    Raises:
      UserError: if the archive is damaged, contains something else, or the disk is full.
    """
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            with tarfile.open(fileobj=_Concatenated(parts, is_quiet), mode="r|*") as archive:
                # The filter refuses members that would be written elsewhere.
                archive.extractall(scratch, filter="data")
            if not (scratch / folder.name).is_dir():
                raise UserError(f"{parts[0]}: the archive has no folder {folder.name}")
            (scratch / folder.name).rename(folder)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{parts[0]} and its other parts cannot be unpacked to {folder} ({error})") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


class _Concatenated(io.RawIOBase):
    """The bytes of several files, one after the other, with a progress bar."""

    def __init__(self, paths: Sequence[Path], is_quiet: bool):
        self._total = sum(path.stat().st_size for path in paths)
        self._chunks = self._read_all(paths, is_quiet)
        self._rest = b""

    def _read_all(self, paths: Sequence[Path], is_quiet: bool) -> Iterator[bytes]:
        options = {"unit": "B", "unit_scale": True, "total": self._total, "show": not is_quiet}
        with progress_bar(desc="unpacking", **options) as bar:
            for path in paths:
                with path.open("rb") as file:
                    while chunk := file.read(2**20):
                        bar.update(len(chunk))
                        yield chunk

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Reads the next bytes into a buffer."""
        self._rest = self._rest or next(self._chunks, b"")
        length = min(len(buffer), len(self._rest))
        buffer[:length], self._rest = self._rest[:length], self._rest[length:]
        return length
