"""Clients of the stores. fsspec keeps one for each store in a process, which etils uses too."""

import os
from typing import TYPE_CHECKING

from alignvlm_jax.locations import open_location

if TYPE_CHECKING:
    import fsspec


def file_system(url: str | os.PathLike[str]) -> "fsspec.AbstractFileSystem":
    """Returns the client of the store that a URL is in.

    Raises:
      LocationError: if the package of the store is missing.
    """
    open_location(url)  # sets the defaults of the clients
    import fsspec

    if os.fspath(url).startswith("gs://"):
        return fsspec.filesystem("gcs", finalize_on_close=True)
    return fsspec.filesystem("s3")
