"""The folder layout of a downloaded benchmark, and the function that reads it."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from alignvlm_jax.evaluation.benchmarks.question import Question


@dataclasses.dataclass(frozen=True)
class Found:
    """The questions of a benchmark in a folder.

    Attributes:
      questions: questions, which may be read on demand.
      missing: one sentence for each part of the benchmark that the folder lacks or has twice.
    """

    questions: Iterable[Question]
    missing: tuple[str, ...] = ()


Read = Callable[[pathlib.Path, str], Found | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One form in which a benchmark is published.

    Attributes:
      name: name of this form and its publisher, for messages.
      expected: expected files, with {split} as a placeholder for the split's name; shown if none is found.
      read: function that takes a folder and a split ("val" or "test"). It returns the questions, or None if the folder
        does not have this layout.
      images: names of the folders that images are published in, if they are apart from the questions.
      is_specific: whether the names of the files tell the benchmark. Those of most Parquet files tell only the split.
    """

    name: str
    expected: str
    read: Read
    images: tuple[str, ...] = ()
    is_specific: bool = True

    def describe(self, split: str) -> str:
        """Returns a description of the expected files of a split."""
        # Parquet shards call the split "validation" where the other forms call it "val".
        parquet_pattern = f"{'validation' if split == 'val' else split}-*"
        return f"{self.name}: {self.expected.replace('{split}-*', parquet_pattern).replace('{split}', split)}"


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names that publishers use for a split."""
    return ("val", "validation", "dev") if split == "val" else (split,)


def missing_parts(title: str, expected: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    """Returns a sentence that names the parts of a benchmark that are not present, or nothing.

    Args:
      title: name of the parts, such as "MMMU's subjects".
      expected: names of all parts.
      present: names of the parts that were found.
    """
    expected, present = list(expected), set(present)
    absent = [name for name in expected if name not in present]
    if not absent:
        return ()
    verb = "is" if len(absent) == 1 else "are"
    return (f"{len(absent)} of {title} {verb} missing (of {len(expected)}): {', '.join(absent)}",)
