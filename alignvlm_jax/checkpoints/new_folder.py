"""A folder that appears complete or not at all."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax.errors import UserError


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a scratch folder beside `folder`, which gets that name when the block ends well and goes when it does not.

    Raises:
      UserError: there is something in `folder` already, or the disk does not take what is written.
    """
    refuse_taken(folder)
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written ({error.strerror})") from error
    try:
        scratch.chmod(0o755)  # mkdtemp's folders are their owner's alone
        yield scratch
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTEMPTY):
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_taken(folder: str | Path) -> None:
    """Raises a `UserError` if there is something in `folder`: to be asked before long work, too."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: name a new folder, or remove it")
