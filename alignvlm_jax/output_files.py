"""Files that commands write: they are checked before the work, and appear when they are complete."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from alignvlm_jax.errors import UserError


def check_writable(file: str | os.PathLike[str]) -> None:
    """Checks that a file can be written, before any long work. Creates nothing.

    Raises:
      UserError: if it cannot be written.
    """
    _check(file, Path(file).absolute().parent)


def check_writable_folder(folder: str | os.PathLike[str]) -> None:
    """Checks that files can be written to a folder, which need not exist, before any long work. Creates nothing.

    Raises:
      UserError: if they cannot.
    """
    _check(folder, Path(folder).absolute())


def _check(output: str | os.PathLike[str], folder: Path) -> None:
    # Missing folders would be created in the closest existing parent.
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({folder}: {error.strerror or error})") from error


@contextlib.contextmanager
def open_atomically(file: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Opens a text file for writing, which replaces an existing one only when it is complete.

    Raises:
      UserError: if the file cannot be written.
    """
    file, scratch = Path(file), None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own keeps two commands that write the same file apart.
        handle, scratch = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            yield stream
        # mkstemp creates files that only their owner may read.
        os.chmod(scratch, 0o644)
        os.replace(scratch, file)
        scratch = None
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error
    finally:
        if scratch is not None:
            os.unlink(scratch)
