"""The lease of an output in a bucket: an object that is renewed, and expires.

    .writer.lease    a count of renewals, and the holder (`Holder`)

**Exactly one winner.** A lease is created only if the object does not exist, and renewed or taken over only if it still
has the version that was read. The store decides this (`storage/versioned.py`), so of several processes that find the
same lease expired, one wins. For the same reason, a holder that could renew its lease has not lost it.

**Clocks.** As for `lease_file.py`: a process that wants the lease watches it with its own clock, and takes over after
`EXPIRE_SECONDS` without a renewal. The time that the store gives an object is only used to refuse.
"""

import sys
import time
from collections.abc import Callable

from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.holder import Holder
from alignvlm_jax.leases.lease import InUseError, LeaseLostError, Place
from alignvlm_jax.leases.renewed import (
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
from alignvlm_jax.storage.versioned import VersionedObject, versioned_object

_POLL_SECONDS = 5.0


class LeaseObject(RenewedLease):
    """A lease in a bucket that this process holds."""

    def __init__(
        self,
        place: Place,
        holder: Holder | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        time_of_day: Callable[[], float] = time.time,
        renews_itself: bool = True,
    ):
        """Takes the lease, after up to `EXPIRE_SECONDS` if it is not known whether its holder lives.

        Args:
          place: where the object is.
          holder: the holder; None is this process.
          clock: returns seconds.
          sleep: waits for a number of seconds.
          time_of_day: returns seconds since 1970, to compare with those of the store.
          renews_itself: whether to renew the lease from a thread.

        Raises:
          InUseError: if its holder lives, or if another process is faster.
          TemporaryError, UserError: if the bucket cannot be used.
        """
        super().__init__(place, holder, clock)
        self._object, self._sleep, self._time_of_day = _object(place), sleep, time_of_day
        self._version = self._take()
        if renews_itself:
            self.start_renewing()

    def ticket(self) -> str | None:
        """Returns the mark of the lease; see `SeenLeaseObject`."""
        return self._mark

    def name(self) -> str:
        """Returns the URL of the lease."""
        return str(self._place.file("lease"))

    def write_renewal(self, count: int) -> bool:
        """Writes a count to the lease; returns False if it is no longer held."""
        version = self._write(count, self._version)
        if version is None:
            return False
        self._version = version
        return True

    def loss(self) -> LeaseLostError:
        """Returns the error of a lease that is no longer held."""
        return _loss(self._place, self._object)

    def delete(self) -> None:
        """Deletes the lease, if it is still held."""
        self._object.delete(self._version)

    def _take(self) -> str:
        while True:
            found = self._object.read()
            if found is not None and not self._wait_until_free(*found):
                continue  # it was released
            version = self._write(0, found and found[1])
            if version is None:
                raise self._refusal()
            return version

    def _write(self, count: int, version: str | None) -> str | None:
        """Writes the lease in place of a version; returns the new version, or None if it has another one."""
        content = content_of(count, self._holder, self._mark)
        if (new := self._object.write(content, version)) is not None:
            return new
        # If the answer was lost, the client has repeated the upload, and has met its own first one.
        found = self._object.read()
        return found[1] if found is not None and found[0] == content else None

    def _wait_until_free(self, content: bytes, version: str, written: float) -> bool:
        """Waits until a lease may be taken over. Returns False if it was released instead."""
        start, theirs = self._clock(), holder_of(content)
        if theirs and (may_take := is_free(theirs, self._holder)) is not None:
            if may_take:
                return True
            raise self._place.refusal(theirs)
        if looks_alive(self._time_of_day() - written):
            raise self._place.refusal(theirs)
        print(describe_wait(self._place, theirs), file=sys.stderr, flush=True)
        while self._clock() - start < EXPIRE_SECONDS:
            self._sleep(_POLL_SECONDS)
            found = self._object.read()
            if found is None:
                return False
            if found[1] != version:
                raise self._place.refusal(holder_of(found[0]))
        return True

    def _refusal(self) -> InUseError:
        found = self._object.read()
        return self._place.refusal(found and holder_of(found[0]))


class SeenLeaseObject:
    """The lease of another process of the same run. It can only be checked."""

    def __init__(self, place: Place, ticket: str):
        self._place, self._mark, self._object = place, ticket, _object(place)

    def check(self) -> None:
        """Checks that no other run has taken the lease; see `Lease.check`."""
        try:
            found = self._object.read()
        except UserError:
            return  # whether it is lost is for the holder to decide, whose end also ends this process
        if found is None or not has_mark(found[0], self._mark):
            raise _loss(self._place, self._object)

    def raise_if_lost(self) -> None:
        """Does nothing, because the holder's end also ends this process."""

    def release(self) -> None:
        """Does nothing, because the lease is the holder's."""

    def ticket(self) -> str | None:
        """Returns the mark of the lease."""
        return self._mark


def _object(place: Place) -> VersionedObject:
    return versioned_object(place.file("lease"))


def _loss(place: Place, stored: VersionedObject) -> LeaseLostError:
    try:
        found = stored.read()
    except UserError:
        found = None
    return describe_loss(place, found and holder_of(found[0]))
