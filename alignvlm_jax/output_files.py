"""Files that commands write, on a disk or in a bucket: they are checked before the work, and appear when complete."""

import contextlib
import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from alignvlm_jax import locations
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import access
from alignvlm_jax.storage.errors import translated_errors


def check_writable(file: str | os.PathLike[str]) -> None:
    """Checks that a file can be written, before any long work. Creates nothing.

    Raises:
      UserError: if it cannot be written.
    """
    if not locations.is_local(file):
        _check_name(file)
        access.check_writable(os.fspath(locations.open_location(file).parent))
        return
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
        other = seen.setdefault(_real(file), option)
        if other != option:
            raise UserError(
                f"{file}: {other} and {option} are the same file, which would be overwritten: name two files"
            )


def check_writable_folder(folder: str | os.PathLike[str]) -> None:
    """Checks that files can be written to a folder, which need not exist, before any long work. Creates nothing.

    Raises:
      UserError: if they cannot.
    """
    if locations.is_local(folder):
        _check(folder, Path(folder).absolute())
    else:
        access.check_writable(os.fspath(folder))


def _check_name(file: str | os.PathLike[str]) -> None:
    """Checks that a location in a bucket can be that of a file."""
    if os.fspath(file).count("/") < 3:  # gs://bucket
        raise UserError(f"{file}: this is a bucket: name a file in it")


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
    elif locations.is_local(file):
        with _open_scratch(file) as scratch, open(scratch, "w", encoding="utf-8") as stream:
            yield stream
    else:
        content = io.StringIO()
        yield content
        write_atomically(file, content.getvalue().encode())


def write_atomically(file: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, which replaces an existing one only when it is complete.

    Raises:
      UserError: if the file cannot be written.
    """
    if locations.is_local(file):
        with _open_scratch(file) as scratch:
            Path(scratch).write_bytes(content)
        return
    try:
        # An object appears when its upload is complete.
        with translated_errors(os.fspath(file)):
            locations.open_location(file).write_bytes(content)
    except FileNotFoundError as error:
        raise UserError(f"{file}: cannot be written (there is no such bucket)") from error


@contextlib.contextmanager
def _open_scratch(file: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the name of an empty file, which replaces `file` if the block succeeds."""
    file, scratch = Path(os.path.realpath(file)), None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own keeps two commands that write the same file apart.
        handle, scratch = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(handle)
        yield scratch
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


def _real(file: str | os.PathLike[str]) -> str:
    """Returns the path of a file without links. A file in a bucket has only one name."""
    return os.path.realpath(file) if locations.is_local(file) else os.fspath(file)
