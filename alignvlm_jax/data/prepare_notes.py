"""What is done of a data set that is being prepared: the plan, and a note of every finished shard.

They are small files in `OUT/progress`, each of which appears whole or not at all. A shard without its note is not done,
whatever is on the disk: a run that is killed, at whatever point, is gone on with by reading the notes.
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

_FOLDER = "progress"
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many records were accepted, and how many refused for each kind of reason."""

    accepted: int
    rejected: Mapping[str, int]

    @property
    def num_rejected(self) -> int:
        """Of all kinds."""
        return sum(self.rejected.values())

    @property
    def total(self) -> int:
        """The records that were looked at."""
        return self.accepted + self.num_rejected

    def __add__(self, other: "Summary") -> "Summary":
        rejected = collections.Counter(self.rejected) + collections.Counter(other.rejected)
        return Summary(self.accepted + other.accepted, dict(rejected.most_common()))


class Notes:
    """The notes in a data set's folder; any number of processes write different ones at the same time."""

    def __init__(self, out: epath.Path):
        self.out, self.folder = out, out / _FOLDER

    def stand_alone(self) -> bool:
        """Whether there is nothing else in the data set's folder, or no such folder."""
        return not self.out.exists() or all(path.name == _FOLDER for path in self.out.iterdir())

    def read_plan(self) -> tuple[str, list[Slice]] | None:
        """The fingerprint of the work begun here and its slices, if there is any."""
        path = self.folder / _PLAN
        if not path.exists():
            return None
        plan = json.loads(path.read_text())
        return plan["fingerprint"], [
            Slice(**{**piece, "picks": piece["picks"] and tuple(piece["picks"])}) for piece in plan["slices"]
        ]

    def write_plan(self, fingerprint: str, slices: Sequence[Slice]) -> None:
        """Writes down what is to be done, and of which input and options that is the plan."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = {"fingerprint": fingerprint, "slices": [dataclasses.asdict(piece) for piece in slices]}
        self._write(self.folder / _PLAN, plan)

    def finished(self) -> list[int]:
        """The numbers of the slices that have their note."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.json"))

    def write(self, index: int, shard: Shard, rejects: Sequence[Refused]) -> None:
        """Note that a shard is there, and what was refused for it."""
        note = {"shard": dataclasses.asdict(shard), "rejects": [dataclasses.asdict(reject) for reject in rejects]}
        self._write(self._path(index), note)

    def summary(self, index: int) -> Summary:
        """What became of the records of a finished slice."""
        note = self._read(index)
        kinds = collections.Counter(reject["kind"] for reject in note["rejects"])
        return Summary(note["shard"]["records"], dict(kinds))

    def shard(self, index: int) -> Shard:
        """The shard that a finished slice became."""
        return Shard(**self._read(index)["shard"])

    def rejects(self) -> Iterator[dict[str, Any]]:
        """All refused records in the order of the input."""
        for index in self.finished():
            yield from self._read(index)["rejects"]

    def forget_rejected(self) -> None:
        """Have the slices with refused records done again: the user may have seen to the reasons by then."""
        for index in self.finished():
            if self._read(index)["rejects"]:
                self._path(index).unlink()

    def clear(self) -> None:
        """Forgets everything."""
        self.folder.rmtree(missing_ok=True)

    def _path(self, index: int) -> epath.Path:
        return self.folder / f"{index:06d}.json"

    def _read(self, index: int) -> dict[str, Any]:
        return json.loads(self._path(index).read_text())

    def _write(self, path: epath.Path, content: dict[str, Any]) -> None:
        with atomic_file(path, self.folder) as partial:
            partial.write_text(json.dumps(content))
