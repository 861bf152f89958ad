"""A question of a benchmark, as every reader of a published format yields it and every metric takes it."""

import dataclasses
import pathlib
from typing import Any

IMAGE = "\ufffc"
"""Stands in a question's text where one of its images goes (Unicode's object replacement character)."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image within a Parquet file; `files.image_bytes` reads it.

    Attributes:
      file: the Parquet file.
      row_group, row: where in it: the group of rows, and the row within that.
      column: which column; `columns` are all that hold images, so that a group is read once.
      index: which image of the cell, where a cell holds a list of them.
    """

    file: pathlib.Path
    row_group: int
    row: int
    column: str
    columns: tuple[str, ...]
    index: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}, column {self.column}"


Picture = pathlib.Path | Cell


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, and what counts as its answer.

    Attributes:
      id: the benchmark's own where it has one, unique within the benchmark.
      where: file and record, for reports.
      text: what is asked, before the benchmark's prompt is put around it; `IMAGE` stands where an image goes. Images
        that it does not place come first.
      images: what is shown, in order.
      references: what is accepted; None where the benchmark keeps the answers to itself.
      group: the part of the benchmark that it counts for as well, such as a subject; "" for none.
      kind: which of the benchmark's prompts it gets, where there are several.
      choices: of a multiple-choice question, in the order of their letters.
      document: of what document a value is asked for, and
      values: for each value of it that is to be found, the accepted spellings (DeepForm, KLC).
      extra: what only the metric of this benchmark wants to know.
      problem: why it cannot be asked; "" if it can. It counts as answered wrongly.
    """

    id: str
    where: str
    text: str = ""
    images: tuple[Picture, ...] = ()
    references: tuple[str, ...] | None = None
    group: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()
    document: str = ""
    values: tuple[tuple[str, ...], ...] = ()
    extra: Any = None
    problem: str = ""
