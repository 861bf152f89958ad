"""Progress of a conversion: the plan, and a note for every finished shard.

These are small files in `OUT/progress`, each written atomically. A shard counts as finished only if it has a note,
whatever else is on disk. Reading the notes is therefore enough to resume a run that was killed at any point.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from alignvlm_jax.data.formats.conversation import Refused, Slice
from alignvlm_jax.data.paths import atomic_file
from alignvlm_jax.data.shards import Shard
from alignvlm_jax.leases.lease import PREFIX

_FOLDER = "progress"
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Number of accepted records, and of refused records for each kind of reason."""

    accepted: int
    rejected: Mapping[str, int]

    @property
    def num_rejected(self) -> int:
        """Number of refused records, all kinds together."""
        return sum(self.rejected.values())

    @property
    def total(self) -> int:
        """Number of records read."""
        return self.accepted + self.num_rejected

    def __add__(self, other: "Summary") -> "Summary":
        rejected = collections.Counter(self.rejected) + collections.Counter(other.rejected)
        return Summary(self.accepted + other.accepted, dict(rejected.most_common()))


class Notes:
    """The notes in a data set's folder; several processes may write different notes at the same time."""

    def __init__(self, out: epath.Path):
        self.out, self.folder = out, out / _FOLDER

    def has_no_other_files(self) -> bool:
        """Returns whether the data set's folder is missing or holds nothing but notes and the lease of the writer."""
        if not self.out.exists():
            return True
        return all(path.name == _FOLDER or path.name.startswith(PREFIX) for path in self.out.iterdir())

    def read_plan(self) -> tuple[str, list[Slice]] | None:
        """Returns the fingerprint and the slices of the conversion started here, or None if there is none."""
        path = self.folder / _PLAN
        if not path.exists():
            return None
        plan = json.loads(path.read_text())
        # JSON has no tuples, and a Slice must be hashable and equal to the original.
        return plan["fingerprint"], [
            Slice(**{**piece, "picks": piece["picks"] and tuple(piece["picks"])}) for piece in plan["slices"]
        ]

    def write_plan(self, fingerprint: str, slices: Sequence[Slice]) -> None:
        """Saves the slices, with the fingerprint of the input and the settings they were planned for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = {"fingerprint": fingerprint, "slices": [dataclasses.asdict(piece) for piece in slices]}
        self._write(self.folder / _PLAN, plan)

    def finished(self) -> list[int]:
        """Returns the numbers of the slices that have a note."""
        # Notes are named by the number of their slice, so the pattern excludes the plan.
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json"))

    def write(self, index: int, shard: Shard, rejects: Sequence[Refused]) -> None:
        """Saves the note of a finished shard and its refused records."""
        note = {"shard": dataclasses.asdict(shard), "rejects": [dataclasses.asdict(reject) for reject in rejects]}
        self._write(self._path(index), note)

    def summary(self, index: int) -> Summary:
        """Returns the counts of a finished slice."""
        note = self._read(index)
        kinds = collections.Counter(reject["kind"] for reject in note["rejects"])
        return Summary(note["shard"]["records"], dict(kinds))

    def shard(self, index: int) -> Shard:
        """Returns the shard of a finished slice."""
        return Shard(**self._read(index)["shard"])

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Yields all refused records in the order of the input."""
        for index in self.finished():
            yield from self._read(index)["rejects"]

    def discard_rejected(self) -> None:
        """Deletes the notes of slices with refused records, so that they are converted again.

        By then the user may have fixed the data.
        """
        for index in self.finished():
            if self._read(index)["rejects"]:
                self._path(index).unlink()

    def clear(self) -> None:
        """Deletes all notes."""
        self.folder.rmtree(missing_ok=True)

    def _path(self, index: int) -> epath.Path:
        return self.folder / f"{index:06d}.json"

    def _read(self, index: int) -> dict[str, Any]:
        return json.loads(self._path(index).read_text())

    def _write(self, path: epath.Path, content: dict[str, Any]) -> None:
        with atomic_file(path, self.folder) as partial:
            partial.write_text(json.dumps(content))
