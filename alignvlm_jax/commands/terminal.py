"""What is printed must not end what prints it.

A signal to a whole job ends the `tee` that reads it too, and a log file may lie on the disk that is full. What is said
then is lost, and a run that was about to save does so.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """While in force, text that standard output and standard error cannot take is dropped, and raises nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lasting, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:
                _silence(stream)  # else Python's own last flush would fail, and change the exit code to 120


class _Lasting:
    """A stream whose `write` and `flush` do not raise OSError; in all else the stream itself."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, method: Any, *arguments: str) -> None:
        try:
            method(*arguments)
        except OSError as error:
            if error.errno == errno.EPIPE:  # for good, where a full disk may have room again
                _silence(self._stream)


def _silence(stream: TextIO) -> None:
    """From here on what is written to the stream goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # no file behind it
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
