"""Takes the lease of an output, of the kind that its storage needs.

    with one_writer("runs/a") as lease:            # a folder that is written in place
        ...
        lease.check()                              # before something is completed
    with one_writer("out.jsonl", beside=True): ... # a file, or a folder that appears when it is complete

`ALIGNVLM_LEASE=local` or `ALIGNVLM_LEASE=shared` chooses the kind, where the type of the file system is misleading. All
hosts must choose the same.
"""

import contextlib
import os
from collections.abc import Iterator

from alignvlm_jax import locations
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases import file_systems
from alignvlm_jax.leases.lease import Lease, NoLease, Place
from alignvlm_jax.leases.lease_file import LeaseFile, SeenLease
from alignvlm_jax.leases.lease_object import LeaseObject, SeenLeaseObject
from alignvlm_jax.leases.local_lock import NO_LOCKS, LocalLock
from alignvlm_jax.storage.access import check_writable
from alignvlm_jax.storage.errors import mark_as_used

KIND_VARIABLE = "ALIGNVLM_LEASE"
_KINDS = ("local", "shared")


@contextlib.contextmanager
def one_writer(output: str | os.PathLike, *, beside: bool = False) -> Iterator[Lease]:
    """Holds the lease of an output for the duration of a `with` block.

    Args:
      output: the file or folder.
      beside: whether the lease's files are next to the output, because it is a file or does not exist yet. Otherwise
        they are in the folder, which is created.

    Raises:
      InUseError: if another run writes to it.
      UserError: if the folder cannot be written.
    """
    lease = take(output, beside=beside)
    try:
        yield lease
    finally:
        lease.release()


def take(output: str | os.PathLike, *, beside: bool = False) -> Lease:
    """Takes the lease of an output; see `one_writer`. The caller must release it."""
    place = _place(output, beside)
    if locations.is_bucket(output):
        return _take_in_bucket(place)
    kind = os.environ.get(KIND_VARIABLE) or None
    if kind not in (None, *_KINDS):
        raise UserError(f"{KIND_VARIABLE}={kind}: expected {' or '.join(_KINDS)}")
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        if kind == "shared" or kind is None and file_systems.is_shared(place.folder):
            return LeaseFile(place)
        try:
            return LocalLock(place)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return LeaseFile(place)
    except (FileExistsError, NotADirectoryError) as error:
        # One of the folders on the way is a file.
        file = next((path for path in (place.folder, *place.folder.parents) if path.is_file()), place.folder)
        raise UserError(f"{file}: a file, expected a folder. Choose another name, or move the file") from error
    except OSError as error:
        where = error.filename or place.folder
        raise UserError(f"{where}: cannot be written ({error.strerror or error})") from error


def _take_in_bucket(place: Place) -> Lease:
    # Also waits for permissions that arrive late, which the lease would not.
    check_writable(str(place.folder))
    return LeaseObject(place)


def with_ticket(output: str | os.PathLike, ticket: str | None, *, beside: bool = False) -> Lease:
    """Returns the lease of another process of the same run, for checking it.

    Args:
      output: the output, as given to `take`.
      ticket: ticket of the holder's lease.
      beside: as given to `take`.
    """
    if ticket is None:
        return NoLease()
    if locations.is_bucket(output):
        mark_as_used(str(output))  # by the holder
    kind = SeenLeaseObject if locations.is_bucket(output) else SeenLease
    return kind(_place(output, beside), ticket)


def _place(output: str | os.PathLike, beside: bool) -> Place:
    return Place.beside(output) if beside else Place.inside(output)
