"""Families of documents, one file each.

Each family has `compose(page, values) -> Questions`, which prints a document and returns the questions it can answer.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions about a document, as (phrasings, answer) pairs.

    Attributes:
      direct: questions from a name to its value.
      reverse: questions from a value to its name, which are asked rarely.
    """

    direct: tuple[tuple[tuple[str, ...], str], ...]
    reverse: tuple[tuple[tuple[str, ...], str], ...] = ()
