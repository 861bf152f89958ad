"""A replacement for gs:// that keeps its files in a local folder: the parts of fsspec that epath uses, offline."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class _Bucket(DirFileSystem):
    protocol = ("gs", "gcs")


@contextlib.contextmanager
def bucket_in(folder: Path) -> Iterator[str]:
    """Maps gs://test/x to folder/test/x in this process."""
    (folder / "test").mkdir(parents=True)
    stand_in = _Bucket(str(folder), LocalFileSystem(auto_mkdir=True))
    with mock.patch.object(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: stand_in):
        yield "gs://test"
