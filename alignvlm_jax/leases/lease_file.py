"""The lease of an output on storage that several hosts share: a file that is renewed, and expires.

    .writer.lease.3    the third lease: a count of renewals, and the holder (`Holder`)

A lease is held by the process that created the file with the highest number, and only this process writes to it. To
take over a lease that has expired, a process creates the next number, and deletes the one before.

**Exactly one winner.** Several processes may find the same lease expired. Each writes its holder to a file with a name
of its own, and makes a hard link to it with the next number. Such a link appears atomically, with its content, and
fails if the name exists, also on NFS. If NFS loses the server's answer and asks again, the link seems to exist already;
the link count of the file tells who made it. FUSE has no links in general: there, a file is created exclusively.

**Clocks.** Hosts' clocks differ, so no time of one host is compared with another's. A process that wants the lease
watches the file with its own clock: if the content has not changed for `EXPIRE_SECONDS`, the holder is dead. If it
changes, the holder lives. In most cases there is nothing to wait for:

- The holder was a process of this machine, and the system knows whether it runs.
- The job is the same: a scheduler that starts a job again has ended it before.
- The file's time is within a renewal of that of a file created now. Both times are the file server's. This is only used
  to refuse, never to take over, so a wrong clock costs a repetition of the command at most.

**Losing it.** The holder renews the lease every `RENEW_SECONDS`, and before it completes anything (`check`). By this it
notices a deleted file or a higher number. If it could not renew the lease for `DOUBT_SECONDS`, it regards it as lost,
which is before anybody else may take it.
"""

import contextlib
import errno
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from alignvlm_jax.leases.holder import Holder
from alignvlm_jax.leases.lease import InUseError, LeaseLostError, Place
from alignvlm_jax.leases.renewed import (
    COUNT_DIGITS,
    EXPIRE_SECONDS,
    RenewedLease,
    content_of,
    describe_loss,
    describe_wait,
    has_mark,
    holder_of,
    is_free,
    looks_alive,
)

_POLL_SECONDS = 1.0
_MAX_BYTES = 2**16  # of a lease
# Errors of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL)
_GONE = (errno.ENOENT, errno.ESTALE)


class LeaseFile(RenewedLease):
    """A lease that this process holds."""

    def __init__(
        self,
        place: Place,
        holder: Holder | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        renews_itself: bool = True,
    ):
        """Takes the lease, after up to `EXPIRE_SECONDS` if it is not known whether its holder lives.

        Args:
          place: where the lease's files are.
          holder: the holder; None is this process.
          clock: returns seconds.
          sleep: waits for a number of seconds.
          renews_itself: whether to renew the lease from a thread.

        Raises:
          InUseError: if its holder lives, or if another process is faster.
          OSError: if the folder cannot be written.
        """
        super().__init__(place, holder, clock)
        self._number = _take(place, self._holder, self._mark, clock, sleep)
        self._path = _path(place, self._number)
        if renews_itself:
            self.start_renewing()

    def ticket(self) -> str | None:
        """Returns the number and the mark of the lease; see `SeenLease`."""
        return f"{self._number} {self._mark}"

    def name(self) -> str:
        """Returns the path of the lease."""
        return str(self._path)

    def write_renewal(self, count: int) -> bool:
        """Writes a count to the lease; returns False if it is no longer held."""
        return _renew(self._path, self._mark, count) and _newest(self._place) == self._number

    def loss(self) -> LeaseLostError:
        """Returns the error of a lease that is no longer held."""
        return _loss(self._place)

    def delete(self) -> None:
        """Deletes the lease, if it is still held."""
        if has_mark(_read(self._path), self._mark):
            self._path.unlink(missing_ok=True)


class SeenLease:
    """The lease of another process of the same run. It can only be checked."""

    def __init__(self, place: Place, ticket: str):
        number, self._mark = ticket.split()
        self._place, self._number = place, int(number)

    def check(self) -> None:
        """Checks that no other run has taken the lease; see `Lease.check`."""
        try:
            is_newest = _newest(self._place) == self._number
            is_held = is_newest and has_mark(_read(_path(self._place, self._number)), self._mark)
        except OSError:
            return  # whether it is lost is for the holder to decide, whose end also ends this process
        if not is_held:
            raise _loss(self._place)

    def raise_if_lost(self) -> None:
        """Does nothing, because the holder's end also ends this process."""

    def release(self) -> None:
        """Does nothing, because the lease is the holder's."""

    def ticket(self) -> str | None:
        """Returns the number and the mark of the lease."""
        return f"{self._number} {self._mark}"


def _take(place: Place, holder: Holder, mark: str, clock: Callable[[], float], sleep: Callable[[float], None]) -> int:
    """Creates the next lease as soon as the newest one is free, and returns its number.

    Raises:
      InUseError: if the holder of the newest one lives, or if another process is faster.
    """
    while True:
        number = _newest(place)
        content = _read(_path(place, number))
        if number and (content is None or not _wait_until_free(place, number, content, holder, clock, sleep)):
            continue  # it was released
        following = number + 1
        if not _create(place, following, holder, mark):
            raise _refusal(place, following)
        if number and _read(_path(place, number)) != content:
            # Its holder lives after all. Or another process has taken this lease, and has already released its own.
            _path(place, following).unlink(missing_ok=True)
            continue
        if (newest := _newest(place)) != following:
            # Other processes were so much faster that the number was free again.
            _path(place, following).unlink(missing_ok=True)
            raise _refusal(place, newest)
        for old in _numbers(place):
            if old < following:
                _path(place, old).unlink(missing_ok=True)
        return following


def _wait_until_free(
    place: Place,
    number: int,
    content: bytes,
    holder: Holder,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> bool:
    """Waits until a lease may be taken over. Returns False if it was released instead.

    Raises:
      InUseError: if its holder lives, or if another process has taken it over.
    """
    path, start = _path(place, number), clock()
    theirs = holder_of(content)
    if theirs and (may_take := is_free(theirs, holder)) is not None:
        if may_take:
            return True
        raise place.refusal(theirs)
    with contextlib.suppress(OSError):
        age = _time_of_new_file(place) - path.stat().st_mtime
        if looks_alive(age):
            raise place.refusal(theirs)
    print(describe_wait(place, theirs), file=sys.stderr, flush=True)
    while clock() - start < EXPIRE_SECONDS:
        sleep(_POLL_SECONDS)
        now = _read(path)
        if now is None and (newest := _newest(place)) > number:
            raise _refusal(place, newest)
        if now is None:
            return False
        if now != content:
            raise place.refusal(theirs)
    return True


def _create(place: Place, number: int, holder: Holder, mark: str) -> bool:
    """Creates the lease with a number, complete with its content; returns False if it exists."""
    target, scratch = _path(place, number), _scratch(place)
    content = content_of(0, holder, mark)
    try:
        _write_new(scratch, content)
        os.link(scratch, target)
        return True
    except FileExistsError:
        # Ask with an open file, because a status that NFS has cached may be from before the link.
        with open(scratch, "rb") as file:
            return os.fstat(file.fileno()).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_exclusively(target, content)
    finally:
        scratch.unlink(missing_ok=True)


def _create_exclusively(target: Path, content: bytes) -> bool:
    """Creates a file without a link, for file systems that have none; returns False if it exists."""
    try:
        _write_new(target, content)
    except OSError as error:
        # gcsfuse reports ESTALE if another host has created the object since it was opened.
        if error.errno not in (errno.EEXIST, errno.ESTALE):
            raise
        return False
    return _read(target) == content


def _renew(path: Path, mark: str, count: int) -> bool:
    """Writes the next count to a lease; returns False if it was deleted or belongs to another process."""
    # Write in place, because readers on NFS may use a replaced file for a while. Never create the file.
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False
    try:
        if not has_mark(os.pread(handle, _MAX_BYTES, 0), mark):
            return False
        os.pwrite(handle, f"{count:0{COUNT_DIGITS}d}".encode(), 0)
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False
    finally:
        os.close(handle)
    return True


def _newest(place: Place) -> int:
    """Returns the highest number of a lease, or 0 if there is none."""
    # NFS remembers the list of a folder's files for a while, but not after this host has changed the folder.
    _time_of_new_file(place)
    return max(_numbers(place), default=0)


def _numbers(place: Place) -> list[int]:
    start = _path(place, 0).name.removesuffix("0")
    names = [name.removeprefix(start) for name in os.listdir(place.folder) if name.startswith(start)]
    return [int(name) for name in names if name.isdigit()]


def _path(place: Place, number: int) -> Path:
    return place.file(f"lease.{number}")


def _scratch(place: Place) -> Path:
    return place.file(f"{uuid.uuid4().hex}.new")


def _time_of_new_file(place: Place) -> float:
    """Creates and removes a file, and returns the time that the file system gave it."""
    scratch = _scratch(place)
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        return scratch.stat().st_mtime
    finally:
        scratch.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> None:
    """Creates a file exclusively, and waits until it is on the storage."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> bytes | None:
    """Returns the content of a lease, or None if it does not exist."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None


def _refusal(place: Place, number: int) -> InUseError:
    return place.refusal(holder_of(_read(_path(place, number)) or b""))


def _loss(place: Place) -> LeaseLostError:
    """Returns the error of a holder whose lease is deleted or no longer the newest."""
    try:
        newest = _newest(place)
        other = holder_of(_read(_path(place, newest)) or b"")
    except OSError:
        other = None  # the folder is gone
    return describe_loss(place, other)
