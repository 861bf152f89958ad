"""Random access to the records of many ArrayRecord files, with a limited number of files open at a time."""

import bisect
import collections
import contextlib
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core.utils.shard_utils import FileInstruction

try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None

_RESERVED_FILES = 128  # for libraries, sockets, checkpoints and logs
_SOURCES = 8  # data sets of a mixture that share the remaining ones


class ArrayRecordFiles:
    """The records of some files, in the order of the files; can be pickled.

    `ArrayRecordDataSource` keeps every file open that it has read from. A large data set has more files than a process
    may open, so this class closes the file that was used least recently when `max_open` are open.

    Args:
      files: the files, and which of their records to use.
      max_open: largest number of files that are open at a time; None means as many as the limits of the process allow.
    """

    def __init__(self, files: Sequence[FileInstruction], max_open: int | None = None):
        self._files, self._max_open = tuple(files), max_open
        self._ends = tuple(itertools.accumulate(file.take for file in files))
        self._start_empty()

    def _start_empty(self) -> None:
        self._limit = self._max_open or max_open_files(len(self._files))
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, ArrayRecordDataSource] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        file = bisect.bisect_right(self._ends, index)
        # A file that another thread still reads from is closed when the last reference to it is gone.
        try:
            return self._open_file(file)[index - self._ends[file] + self._files[file].take]
        except Exception:
            with self._lock:
                self._open.pop(file, None)  # a reader that has failed fails forever
            raise

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        """Returns several records, in the given order."""
        return [self[index] for index in indices]

    def _open_file(self, file: int) -> ArrayRecordDataSource:
        """Returns the reader of a file, and closes another one if too many are open."""
        with self._lock:
            reader = self._open.pop(file, None) or ArrayRecordDataSource(self._files[file])
            self._open[file] = reader
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_max_open": self._max_open, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()


def max_open_files(wanted: int) -> int:
    """Returns how many files one data set may keep open, and raises the soft limit of the process if that helps.

    Args:
      wanted: number of files of the data set.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted * _SOURCES + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        # A process may raise its soft limit up to the hard one.
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        if raised > soft:
            with contextlib.suppress(OSError, ValueError):  # macOS has a further limit
                resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - _RESERVED_FILES) // _SOURCES))
