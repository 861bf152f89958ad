"""An object that is replaced only if nobody else has replaced it meanwhile.

GCS gives every upload of an object a generation, and S3 an ETag. An upload may demand that the object still has a
version, or does not exist. The store checks this and replaces the object in one step.
"""

import datetime
import os
from typing import Protocol

from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.clients import file_system
from alignvlm_jax.storage.errors import translated_errors

_TIMEOUT = 10.0  # of an attempt, in seconds
_DEADLINE = 30.0  # of all attempts


class VersionedObject(Protocol):
    """An object at a fixed place. Every method raises TemporaryError or UserError if the bucket cannot be used."""

    def read(self) -> tuple[bytes, str, float] | None:
        """Returns its content, its version and the time of its upload by the store's clock; None if there is none."""

    def write(self, content: bytes, version: str | None) -> str | None:
        """Replaces `version` of the object, or creates it for None. Returns the new version.

        Returns None if the object has another version. This also happens if the answer to a successful upload is lost,
        because the client then repeats it.
        """

    def delete(self, version: str) -> None:
        """Deletes a version of the object. Any other version stays."""


def versioned_object(url: str | os.PathLike[str]) -> VersionedObject:
    """Returns the object at a URL, which need not exist."""
    url = os.fspath(url)
    open_location(url)  # checks the packages
    return _GcsObject(url) if url.startswith("gs://") else _S3Object(url)


class _GcsObject:
    def __init__(self, url: str):
        from google.cloud import storage

        bucket, _, self._key = url.removeprefix("gs://").partition("/")
        self._url = url
        with translated_errors(url):
            self._bucket = storage.Client().bucket(bucket)

    def read(self) -> tuple[bytes, str, float] | None:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with translated_errors(self._url):
            for _ in range(10):
                try:
                    blob = self._bucket.get_blob(self._key, timeout=_TIMEOUT, retry=self._retry())
                    if blob is None:
                        return None
                    content = blob.download_as_bytes(
                        if_generation_match=blob.generation, timeout=_TIMEOUT, retry=self._retry()
                    )
                    return content, str(blob.generation), blob.updated.timestamp()
                except (NotFound, PreconditionFailed):
                    continue  # it was replaced between the two requests
        return None

    def write(self, content: bytes, version: str | None) -> str | None:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob = self._bucket.blob(self._key)
        with translated_errors(self._url):
            try:
                blob.upload_from_string(
                    content, if_generation_match=int(version or 0), timeout=_TIMEOUT, retry=self._retry()
                )
            except PreconditionFailed:
                return None
            except NotFound as error:
                raise FileNotFoundError(f"{self._url}: no such bucket") from error
        return str(blob.generation)

    def delete(self, version: str) -> None:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with translated_errors(self._url):
            try:
                self._bucket.blob(self._key).delete(
                    if_generation_match=int(version), timeout=_TIMEOUT, retry=self._retry()
                )
            except (NotFound, PreconditionFailed):
                pass

    def _retry(self):
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_timeout(_DEADLINE)


class _S3Object:
    def __init__(self, url: str):
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self._url, self._place = url, {"Bucket": bucket, "Key": key}
        self._store = file_system(url)

    def read(self) -> tuple[bytes, str, float] | None:
        with translated_errors(self._url):
            try:
                head = self._store.call_s3("head_object", **self._place)
                content = self._store.cat_file(self._url)
                after = self._store.call_s3("head_object", **self._place)
            except FileNotFoundError:
                return None
        if head["ETag"] != after["ETag"]:
            return self.read()
        modified: datetime.datetime = head["LastModified"]
        return content, head["ETag"], modified.timestamp()

    def write(self, content: bytes, version: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with translated_errors(self._url):
            try:
                return self._store.call_s3("put_object", **self._place, Body=content, **condition)["ETag"]
            except OSError as error:
                answer = getattr(error.__cause__, "response", None) or {}
                status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
                # 409: another upload was being decided. 404: the object to replace was deleted.
                is_conflict = status in (409, 412) or (
                    status == 404 and answer.get("Error", {}).get("Code") == "NoSuchKey"
                )
                if not is_conflict:
                    raise
        return None

    def delete(self, version: str) -> None:
        found = self.read()
        if found is not None and found[1] == version:
            with translated_errors(self._url):
                self._store.call_s3("delete_object", **self._place)
