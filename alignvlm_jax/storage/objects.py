"""Lists, writes and deletes the objects of a bucket, with the checksums and versions that the store keeps of them."""

import dataclasses
import os

from alignvlm_jax.storage.clients import file_system
from alignvlm_jax.storage.errors import translated_errors


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """An object, as the store lists it.

    Attributes:
      size: size in bytes.
      checksum: checksum of its content as {algorithm: value}, computed by the store: "md5" and "crc32c" on GCS, "etag"
        on S3.
      version: identifies this upload of it: the generation on GCS, the ETag on S3.
    """

    size: int
    checksum: dict[str, str]
    version: str


def list_objects(folder: str | os.PathLike[str]) -> dict[str, StoredObject]:
    """Returns the objects in a folder at any depth, by their paths in it. One request lists up to 1,000 of them.

    Raises:
      TemporaryError, UserError: if the bucket cannot be listed.
    """
    url = os.fspath(folder)
    start = len(url.partition("://")[2]) + 1
    with translated_errors(url):
        found = file_system(url).find(url, detail=True)
    # A folder that was made by hand in a browser is an empty object whose name ends with a slash.
    return {name[start:]: _object(info) for name, info in found.items() if name[start:] and not name.endswith("/")}


def list_names(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the objects and folders in a folder, without those at greater depths.

    Raises:
      TemporaryError, UserError: if the bucket cannot be listed.
    """
    url = os.fspath(folder)
    with translated_errors(url):
        try:
            paths = file_system(url).ls(url, detail=False)
        except FileNotFoundError:
            return []
    return [name for path in paths if (name := path.rstrip("/").rpartition("/")[2])]


def delete_folder(folder: str | os.PathLike[str]) -> None:
    """Deletes the objects in a folder. A folder without objects is not an error.

    Raises:
      TemporaryError, UserError: if an object cannot be deleted.
    """
    url = os.fspath(folder)
    objects = [f"{url}/{name}" for name in list_objects(url)]
    if objects:
        with translated_errors(url):
            try:
                file_system(url).rm(objects)
            except FileNotFoundError:
                pass  # another process has deleted them


def _object(info: dict) -> StoredObject:
    if "generation" in info:
        # An object that was composed of others has no MD5.
        checksum = {"md5": info.get("md5Hash"), "crc32c": info.get("crc32c")}
        version = str(info["generation"])
    else:
        version = info["ETag"].strip('"')
        checksum = {"etag": version}
    return StoredObject(int(info["size"]), {name: value for name, value in checksum.items() if value}, version)
