"""Writes a folder that is either complete or does not appear at all.

On a disk, a scratch folder is renamed at the end. A bucket cannot rename: there the files are written in place, and an
object `.unfinished` is with them until all are there. A run that is killed leaves it, and the next one starts over.
"""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import Lease
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.locations import is_local, open_location
from alignvlm_jax.storage import access

UNFINISHED = ".unfinished"
"""Name of the object in a folder of a bucket that is not complete."""


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a folder to write to. If the block succeeds, its files are those of `folder`, otherwise they are deleted.

    Raises:
      InUseError: if another process is writing the same folder.
      UserError: if `folder` exists and is not empty, or if the disk is full or cannot be written.
    """
    check_is_free(folder)
    if not is_local(folder):
        access.check_writable(str(folder))
    with one_writer(folder, beside=True) as lease:
        if is_local(folder):
            yield from _write(Path(folder).absolute(), lease)
        else:
            yield from _write_to_bucket(open_location(folder), lease)


def _write_to_bucket(folder: Path, lease: Lease) -> Iterator[Path]:
    folder.rmtree(missing_ok=True)  # what a killed run left
    (folder / UNFINISHED).write_bytes(b"")
    try:
        yield folder
        lease.check()
        (folder / UNFINISHED).unlink()
    except BaseException:
        # If this fails, too, the next run deletes the files.
        with contextlib.suppress(Exception):
            folder.rmtree()
        raise


def _write(folder: Path, lease: Lease) -> Iterator[Path]:
    try:
        # Next to `folder`: a rename is atomic only within a file system.
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written ({error.strerror})") from error
    try:
        scratch.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        yield scratch
        lease.check()
        # `rmdir` fails if anything was written there in the meantime.
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTEMPTY):
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_is_free(folder: str | Path) -> None:
    """Checks that `folder` does not exist or is empty. Call it before long work, whose result would have no place.

    Raises:
      UserError: if `folder` exists and is not an empty folder.
    """
    folder = open_location(folder)
    if not is_local(folder) and (folder / UNFINISHED).exists():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: name a new folder, or remove it")
