"""The parts of a lease that expires: who may take it over, and how its holder renews it.

The two kinds of storage have different ways to write a lease: `lease_file.py` and `lease_object.py`.
"""

import abc
import contextlib
import itertools
import os
import threading
import uuid
from collections.abc import Callable

from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.holder import Holder
from alignvlm_jax.leases.lease import LeaseLostError, Place

RENEW_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
DOUBT_SECONDS = EXPIRE_SECONDS - RENEW_SECONDS
TOLERANCE_SECONDS = 5.0
"""Lateness of a renewal that is normal on a busy machine."""
COUNT_DIGITS = 12


class RenewedLease(abc.ABC):
    """A lease that this process holds and renews. A subclass takes it, and writes it."""

    def __init__(self, place: Place, holder: Holder | None, clock: Callable[[], float]):
        self._place, self._clock = place, clock
        self._holder = holder or Holder.this_process()
        self._loss: LeaseLostError | None = None
        # A word by which the lease is recognized, even if a folder was removed and written again.
        self._mark = f"{self._holder.pid}-{uuid.uuid4().hex}"
        self._renewals = itertools.count(1)
        self._mutex = threading.Lock()
        self._renewed = clock()
        self._stopped = threading.Event()

    def check(self) -> None:
        """Renews the lease; see `Lease.check`.

        Raises:
          LeaseLostError: if another process has taken it, or could have.
        """
        try:
            self.renew()
        except (OSError, UserError) as error:
            # Nobody else can have taken it yet if it was renewed a short time ago.
            if self._clock() - self._renewed > DOUBT_SECONDS:
                reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
                self._loss = self._place.loss(f"{self.name()} could not be renewed for {DOUBT_SECONDS:g} s ({reason})")
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises the error if `check` or the thread has found that the lease is lost; see `Lease.raise_if_lost`."""
        if self._loss is not None:
            raise self._loss

    def renew(self) -> None:
        """Shows all others that the holder lives, and finds out whether the lease is lost.

        Raises:
          OSError, UserError: if the storage cannot be reached.
        """
        with self._mutex:
            if self._loss is not None:
                return
            # The time before the first access: from then on at the latest, others count from here.
            start = self._clock()
            if self.write_renewal(next(self._renewals)):
                self._renewed = start
            else:
                self._loss = self.loss()

    def release(self) -> None:
        """Removes the lease, for the next writer."""
        self._stopped.set()
        with self._mutex, contextlib.suppress(OSError, UserError):
            if self._loss is None:
                self.delete()

    def start_renewing(self) -> None:
        """Renews the lease from a thread, until it is released or lost."""
        threading.Thread(target=self._keep_renewing, name="lease", daemon=True).start()

    @abc.abstractmethod
    def name(self) -> str:
        """Returns the name of the lease for messages."""

    @abc.abstractmethod
    def write_renewal(self, count: int) -> bool:
        """Writes a count to the lease; returns False if it is no longer held."""

    @abc.abstractmethod
    def loss(self) -> LeaseLostError:
        """Returns the error of a lease that is no longer held."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Deletes the lease, if it is still held."""

    def _keep_renewing(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError, UserError):  # the next renewal may succeed
                self.renew()
            if self._loss is not None:
                return


def is_free(theirs: Holder, mine: Holder) -> bool | None:
    """Returns whether the lease of `theirs` may be taken over now, or None if only watching it can tell."""
    is_same_job = theirs.job is not None and mine.job is not None and theirs.job.name == mine.job.name
    if is_same_job and mine.job.attempt > theirs.job.attempt:
        return True
    is_running = theirs.is_running()
    if is_running is not None:
        return not is_running
    # On another machine, or in another container, the same job was ended before it was started again.
    return True if is_same_job and mine.job.attempt == theirs.job.attempt else None


def looks_alive(age: float) -> bool:
    """Returns whether a lease that was written `age` seconds ago is probably held.

    The clocks may be wrong, so this may only be used to refuse, and never to take over.
    """
    return -TOLERANCE_SECONDS <= age <= RENEW_SECONDS + TOLERANCE_SECONDS


def content_of(count: int, holder: Holder, mark: str) -> bytes:
    """Returns the content of a lease."""
    return f"{count:0{COUNT_DIGITS}d}\n{holder.to_json()}\n{mark}\n".encode()


def has_mark(content: bytes | None, mark: str) -> bool:
    """Returns whether a lease has this mark."""
    return content is not None and content.decode(errors="replace").splitlines()[-1:] == [mark]


def holder_of(content: bytes) -> Holder | None:
    """Returns the holder of a lease, or None if its content is incomplete."""
    lines = content.decode(errors="replace").splitlines()
    return Holder.from_json(lines[1]) if len(lines) > 1 else None


def describe_wait(place: Place, holder: Holder | None) -> str:
    """Returns the line that a run prints before it waits for a lease."""
    who = f" ({holder.describe()})" if holder else ""
    return f"{place.output}: waiting up to {EXPIRE_SECONDS:g} s to see whether another run{who} still writes to it"


def describe_loss(place: Place, other: Holder | None) -> LeaseLostError:
    """Returns the error of a lease that was deleted, or that another process holds."""
    taken = "its lease was deleted" if other is None else f"another run took over its lease: {other.describe()}"
    return place.loss(taken)
