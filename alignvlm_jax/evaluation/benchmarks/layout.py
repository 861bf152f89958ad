"""The folder layout of a downloaded benchmark, and the function that reads it."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from alignvlm_jax.evaluation.benchmarks.question import Question

Read = Callable[[pathlib.Path, str], Iterable[Question] | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One form in which a benchmark is published.

    Attributes:
      name: name of this form and its publisher, for messages.
      expected: expected files, with {split} as a placeholder for the split's name; shown if none is found.
      read: function that takes a folder and a split ("val" or "test") and returns the questions, or None if the folder
        does not have this layout.
    """

    name: str
    expected: str
    read: Read

    def describe(self, split: str) -> str:
        """Returns a description of the expected files of a split."""
        # Parquet shards call the split "validation" where the other forms call it "val".
        parquet_pattern = f"{'validation' if split == 'val' else split}-*"
        return f"{self.name}: {self.expected.replace('{split}-*', parquet_pattern).replace('{split}', split)}"


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names that publishers use for a split."""
    return ("val", "validation", "dev") if split == "val" else (split,)
