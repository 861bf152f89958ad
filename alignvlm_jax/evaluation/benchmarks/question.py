"""The common form of a benchmark question.

Every file reader yields `Question` objects, and every metric takes them.
"""

import dataclasses
import pathlib
from typing import Any

IMAGE = "\ufffc"
"""Placeholder of an image within a question's text (Unicode's object replacement character)."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Reference to an image within a Parquet file; `files.image_bytes` reads it.

    Attributes:
      file: path of the Parquet file.
      row_group: number of the row group.
      row: number of the row within the group.
      column: name of the column.
      columns: names of all image columns. They are read together, so that a row group is decoded only once.
      index: index of the image if the cell holds a list of images.
    """

    file: pathlib.Path
    row_group: int
    row: int
    column: str
    columns: tuple[str, ...]
    index: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}, column {self.column}"


ImageSource = pathlib.Path | Cell


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its accepted answers.

    Attributes:
      id: unique id within the benchmark; the benchmark's own id if it has one.
      where: file and record, for messages.
      text: question, without the benchmark's prompt around it. `IMAGE` marks the place of an image; images without a
        mark come first.
      images: images in the order in which the model sees them.
      references: accepted answers; None if the benchmark withholds them.
      group: part of the benchmark with a score of its own, such as a subject; "" for none.
      kind: key of the prompt, for benchmarks with several prompts.
      choices: options of a multiple-choice question, in the order of their letters.
      document: id of the document that the value belongs to (DeepForm, KLC).
      values: accepted spellings of each value to be found in the document (DeepForm, KLC).
      extra: additional information for the benchmark's metric; a string is a remark for the report.
      is_published: whether the files have this question. A value of a document that no question asks for counts as
        missed, but not as a question.
      problem: reason why the question cannot be asked; "" if it can. Such a question counts as answered wrongly.
    """

    id: str
    where: str
    text: str = ""
    images: tuple[ImageSource, ...] = ()
    references: tuple[str, ...] | None = None
    group: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()
    document: str = ""
    values: tuple[tuple[str, ...], ...] = ()
    extra: Any = None
    is_published: bool = True
    problem: str = ""
