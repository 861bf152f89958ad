"""Files that commands write: they are checked before the work, and appear when they are complete."""

import contextlib
import os
import stat
import sys
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
    if os.path.isdir(file):
        raise UserError(f"{file}: this is a folder: name a file in it")
    if is_stream(file):
        if not os.access(file, os.W_OK):
            raise UserError(f"{file}: cannot be written (Permission denied)")
        return
    _check(file, Path(os.path.realpath(file)).parent)


def check_distinct(**files: str | os.PathLike[str] | None) -> None:
    """Checks that no two options name the same file, because one output would replace the other.

    Args:
      **files: the file of each option ("json" for --json); None for an option that is not given.

    Raises:
      UserError: if two of them are the same file.
    """
    seen: dict[str, str] = {}
    for name, file in files.items():
        if file is None or is_stream(file):
            continue
        option = "IMAGE" if name == "image" else f"--{name}"
        other = seen.setdefault(os.path.realpath(file), option)
        if other != option:
            raise UserError(
                f"{file}: {other} and {option} are the same file, which would be overwritten: name two files"
            )


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

    A link stays a link: the file that it leads to is replaced. Devices and pipes, such as /dev/stdout, are written to.

    Raises:
      UserError: if the file cannot be written.
    """
    if is_stream(file):
        with _open_stream(file) as stream:
            yield stream
        return
    file, scratch = Path(os.path.realpath(file)), None
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


def is_stream(file: str | os.PathLike[str]) -> bool:
    """Returns whether a file is written to, instead of replaced: a device, a pipe, or what stdout is redirected to."""
    try:
        status = os.stat(file)
    except OSError:
        return False
    return not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or _is_stdout(status)


def _is_stdout(status: os.stat_result) -> bool:
    try:
        return os.path.samestat(status, os.fstat(1))
    except OSError:
        return False


@contextlib.contextmanager
def _open_stream(file: str | os.PathLike[str]) -> Iterator[TextIO]:
    try:
        # A second handle on the file of stdout would write over the lines that are there.
        if _is_stdout(os.stat(file)):
            yield sys.stdout
            sys.stdout.flush()
        else:
            with open(file, "w", encoding="utf-8") as stream:
                yield stream
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error
