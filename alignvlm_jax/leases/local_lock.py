"""The lease of an output on a local disk: a lock of the operating system, which the end of a process frees.

    .writer.lock    locked while somebody writes
    .writer.json    who that is (`Holder`), for messages

Also `kill -9` and a crash of the machine free the lock, so there is nothing to wait for and nothing to clean up.
"""

import contextlib
import errno
import time

import filelock

from alignvlm_jax.leases.holder import Holder
from alignvlm_jax.leases.lease import Place

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""


class LocalLock:
    """A lock that this process holds."""

    def __init__(self, place: Place):
        """Takes the lock.

        Args:
          place: where the lock's files are.

        Raises:
          InUseError: if another process holds it, or another part of this one.
          OSError: if the folder cannot be written, or the file system has no locks.
        """
        self._place = place
        self._file, self._info = place.file("lock"), place.file("json")
        # Any thread may release the lock, so it must not belong to one.
        self._lock = filelock.FileLock(self._file, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise place.refusal(self._read_holder()) from None
        status = self._file.stat()
        self._identity = status.st_dev, status.st_ino
        # The information is only for messages, so a full disk does not matter.
        with contextlib.suppress(OSError):
            self._info.write_text(Holder.this_process().to_json(), encoding="utf-8")

    def check(self) -> None:
        """Checks that the lock's file is still in place; see `Lease.check`.

        Raises:
          LeaseLostError: if the file was deleted, for example with the folder. Another run may have created it again.
        """
        try:
            status = self._file.stat()
            is_in_place = (status.st_dev, status.st_ino) == self._identity
        except FileNotFoundError:
            is_in_place = False
        except OSError:
            return  # a folder that cannot be read now says nothing about the lock
        if not is_in_place:
            raise self._place.loss(f"{self._file} was deleted or replaced while it was running")

    def raise_if_lost(self) -> None:
        """Does nothing: the operating system takes no lock away."""

    def release(self) -> None:
        """Frees the lock and removes its files."""
        # Remove the files while the lock is held. Whoever waits for a removed file starts again with a new one.
        with contextlib.suppress(OSError):
            status = self._file.stat()
            if (status.st_dev, status.st_ino) == self._identity:
                self._info.unlink(missing_ok=True)
                self._file.unlink()
        self._lock.release()

    def ticket(self) -> str | None:
        """Returns None: all processes of a run on a local disk depend on the one that holds the lock."""
        return None

    def _read_holder(self) -> Holder | None:
        # The holder may have taken the lock just now. The information of an earlier, killed one would be wrong.
        for _ in range(20):
            with contextlib.suppress(OSError):
                holder = Holder.from_json(self._info.read_text(encoding="utf-8"))
                if holder and holder.is_running() is not False:
                    return holder
            time.sleep(0.02)
        return None
