"""Writes a folder that is either complete or does not appear at all."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import Lease
from alignvlm_jax.leases.one_writer import one_writer


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a scratch folder, which is renamed to `folder` if the block succeeds and deleted otherwise.

    Raises:
      InUseError: if another process is writing the same folder.
      UserError: if `folder` exists and is not empty, or if the disk is full or cannot be written.
    """
    check_is_free(folder)
    with one_writer(folder, beside=True) as lease:
        yield from _write(Path(folder).absolute(), lease)


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
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: name a new folder, or remove it")
