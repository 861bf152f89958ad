"""Defines a lease: the right of one process to write an output."""

import dataclasses
import os
from pathlib import Path
from typing import Protocol

from alignvlm_jax.errors import TemporaryError
from alignvlm_jax.leases.holder import Holder
from alignvlm_jax.locations import is_bucket, open_location

PREFIX = ".writer"
"""Beginning of the names of the files in a folder that belong to its lease."""


class InUseError(TemporaryError):
    """Raised if another run is writing to an output."""


class LeaseLostError(TemporaryError):
    """Raised in a writer that may no longer complete anything, because another run has its lease."""


class Lease(Protocol):
    """The right to write an output, until it is released or lost."""

    def check(self) -> None:
        """Checks, right before something is completed (sealed, renamed), that this process still holds the lease.

        Raises:
          LeaseLostError: if it does not.
        """

    def raise_if_lost(self) -> None:
        """Raises the error of `check` if a loss is already known. It reads nothing, so it may be called at every step.

        Raises:
          LeaseLostError: if the lease is lost.
        """

    def release(self) -> None:
        """Gives the lease back, for the next writer."""

    def ticket(self) -> str | None:
        """Returns what another process of the same run needs to check this lease too (`one_writer.with_ticket`)."""


class NoLease:
    """A lease of an output that needs none, because only its writer knows its name."""

    def check(self) -> None:
        """Does nothing."""

    def raise_if_lost(self) -> None:
        """Does nothing."""

    def release(self) -> None:
        """Does nothing."""

    def ticket(self) -> str | None:
        """Returns None."""
        return None


@dataclasses.dataclass(frozen=True)
class Place:
    """Location of the files of a lease.

    Attributes:
      output: the output, as the user named it.
      folder: folder of the lease's files.
      prefix: beginning of their names.
    """

    output: str
    folder: Path
    prefix: str

    @classmethod
    def inside(cls, folder: str | os.PathLike) -> "Place":
        """Returns the place of a folder that is written in place, such as a workdir."""
        return cls(str(folder), open_location(folder), PREFIX)

    @classmethod
    def beside(cls, path: str | os.PathLike) -> "Place":
        """Returns the place of a file, or of a folder that appears only when it is complete."""
        place = open_location(path)
        if not is_bucket(place):
            # Two names of one file, through links, must have one lease.
            place = place.resolve()
        return cls(str(path), place.parent, f".{place.name}{PREFIX}")

    def file(self, suffix: str) -> Path:
        """Returns the path of a file of the lease."""
        return self.folder / f"{self.prefix}.{suffix}"

    def refusal(self, holder: Holder | None) -> InUseError:
        """Returns the error of a run that finds the output in use."""
        who = "" if holder is None else f": {holder.describe()}"
        return InUseError(
            f"{self.output}: another run is writing to it{who}. Wait until it has ended, or choose another place"
        )

    def loss(self, reason: str) -> LeaseLostError:
        """Returns the error of a run that finds its lease lost."""
        return LeaseLostError(
            f"{self.output}: this run stops without completing anything more, because {reason}. What it completed "
            "before is kept"
        )
