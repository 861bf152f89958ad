"""Where a benchmark's files lie once they are fetched, and who reads them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from alignvlm_jax.evaluation.benchmarks.question import Question

Read = Callable[[pathlib.Path, str], Iterable[Question] | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One form in which a benchmark is published.

    Attributes:
      name: who publishes it so.
      expected: the files that are looked for, with {split} where the split's name goes; shown when none is found.
      read: the questions in a folder, of a split ("val" or "test"); None if no such files are there.
    """

    name: str
    expected: str
    read: Read

    def describe(self, split: str) -> str:
        """What is looked for, of a split."""
        of_parquet = f"{'validation' if split == 'val' else split}-*"
        return f"{self.name}: {self.expected.replace('{split}-*', of_parquet).replace('{split}', split)}"


def split_names(split: str) -> tuple[str, ...]:
    """What publishers call a split."""
    return ("val", "validation", "dev") if split == "val" else (split,)
