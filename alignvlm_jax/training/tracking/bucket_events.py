"""Lets tensorboardX write event files to a bucket.

An object in a bucket has no end to append to: it is replaced as a whole. So the events are kept in memory until their
file has `MAX_BYTES`, and each flush uploads all of them. The next file then continues: TensorBoard reads the files of a
folder in the order of their names.

tensorboardX has writers for buckets, which never start a new file. Its thread also ends at the first upload that fails,
and the curves with it. Here a later flush uploads again.
"""

import sys
import time

from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import BUCKETS, open_location
from alignvlm_jax.parallel import distributed
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.training.tracking.tensorboardx import register_writer_factory

MAX_BYTES = 4 * 2**20
"""Size of a file after which the next one begins. Images of pages make files grow fast."""
RETRY_SECONDS = 60.0
"""Time after a failed upload before the same events are uploaded again."""


def register() -> None:
    """Makes tensorboardX open files in buckets with `BucketEvents`."""
    for scheme in BUCKETS:
        register_writer_factory(scheme, _Factory)


class BucketEvents:
    """An event file in a bucket, and the files that continue it."""

    def __init__(self, path: str):
        self._path, self._number = path, 0
        self._content, self._header = bytearray(), b""
        self._is_uploaded, self._has_failed = True, False
        self._next_try = 0.0

    def write(self, data: bytes) -> None:
        """Adds to the file; `flush` uploads it."""
        self._content += data
        self._is_uploaded, self._next_try = False, 0.0

    def flush(self) -> None:
        """Uploads what is new. If that fails, the next flush with new events tries again, or one after a minute."""
        # tensorboardX flushes a file five times as it closes it. During an outage, an upload fails after half a minute.
        if self._is_uploaded or time.monotonic() < self._next_try:
            return
        path = f"{self._path}.{self._number:06d}" if self._number else self._path
        try:
            with translated_errors(path):
                open_location(path).write_bytes(bytes(self._content))
        except (UserError, OSError) as error:
            if not self._has_failed:
                distributed.log(f"warning: TensorBoard's file is not up to date: {error}", file=sys.stderr)
            self._has_failed, self._next_try = True, time.monotonic() + RETRY_SECONDS
            return
        self._is_uploaded, self._has_failed = True, False
        # The first record of every file states the version of the format. Its length is in its first 8 bytes.
        self._header = self._header or bytes(self._content[: 16 + int.from_bytes(self._content[:8], "little")])
        if len(self._content) >= MAX_BYTES:
            self._content, self._number = bytearray(self._header), self._number + 1

    def close(self) -> None:
        """Uploads what is new."""
        self.flush()


class _Factory:
    """The functions that tensorboardX calls for the files of a URL scheme."""

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: a bucket has no folders."""

    @staticmethod
    def open(path: str) -> BucketEvents:
        """Opens a new file."""
        return BucketEvents(path)
