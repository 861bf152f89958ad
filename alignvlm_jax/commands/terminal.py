"""Keeps a closed or broken stdout or stderr from ending a run.

A signal to a whole job also ends the `tee` that reads its output, and a log file may be on a full disk. The output is
then lost, but the run can still save its state.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def ignore_output_errors() -> Iterator[None]:
    """Drops text that stdout and stderr cannot accept, instead of raising an error, while the context is active."""
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
    """Stream whose `write` and `flush` do not raise OSError; everything else is passed to the original stream."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._call(self._stream.write, text)
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


def _redirect_to_null(stream: TextIO) -> None:
    """Discards everything that is written to the stream from now on."""
    # A stream without a file descriptor raises one of these errors.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
