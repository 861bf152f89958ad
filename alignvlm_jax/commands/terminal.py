r"""Keeps an output that is closed, broken, full or not UTF-8 from ending a run.

A signal to a whole job also ends the `tee` that reads its output, and a log file may be on a full disk. The output is
then lost, but the run can still save its state. A character that the encoding of the output lacks is printed as an
escape, such as \xe4.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Escapes or drops text that stdout and stderr cannot accept, instead of raising an error, while active."""
    _open_closed_descriptors()
    originals = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_TolerantStream, originals)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = originals
        for stream in originals:
            try:
                stream.flush()
            except OSError:
                # Otherwise Python's own flush at exit would fail, and change the exit code to 120.
                _redirect_to_null(stream)


class _TolerantStream:
    """Stream whose `write` and `flush` do not raise OSError or UnicodeEncodeError.

    Everything else is passed to the original stream. Complete lines are written at once, because a log file should
    show what a run does now.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._call(self._stream.write, text)
        except UnicodeEncodeError:
            # The characters are missing in the encoding, or they are undecodable bytes of a file's name.
            encoding = self._stream.encoding
            escaped = text.encode(encoding, "backslashreplace").decode(encoding)
            self._call(self._stream.write, escaped)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._call(self._stream.flush)

    def _call(self, method: Any, *arguments: str) -> None:
        try:
            method(*arguments)
        except OSError as error:
            # A closed pipe stays closed, while a full disk may have space again later.
            if error.errno == errno.EPIPE:
                _redirect_to_null(self._stream)


def _open_closed_descriptors() -> None:
    """Opens the null device for each standard stream that was closed before the program started (`>&-`)."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get this number, and libraries would print into it.
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    # Python sets the streams that were closed to None.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")


def _redirect_to_null(stream: TextIO) -> None:
    """Discards everything that is written to the stream from now on."""
    # A stream without a file descriptor raises one of these errors.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
