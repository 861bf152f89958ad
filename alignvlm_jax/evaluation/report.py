"""Exact match: counts, confidence intervals and a table.

A `Tally` counts right answers. Its interval is Wilson's 95 % score interval. It stays within [0, 1], and it is
meaningful for few questions and for scores near 0 or 1: for 0 right of 20 it is 0.00 to 0.16, not 0 to 0.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from alignvlm_jax.inference.answers import count_warnings

_Z = 1.959964  # 95 % of a normal distribution lie within this many standard deviations of its mean.


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question with its expected and its predicted answer.

    Attributes:
      document: id of the page.
      family: family of documents, such as form or receipt.
      font: font of the page.
      question: text of the question.
      expected: correct answer.
      predicted: answer of the model.
      warnings: kinds of warnings about the answer (`inference/answers.py`).
      record: index of the record in the split; None if it is not known.
    """

    document: str
    family: str
    font: str
    question: str
    expected: str
    predicted: str
    warnings: tuple[str, ...] = ()
    record: int | None = None

    @property
    def is_right(self) -> bool:
        """True if both answers are the same text, apart from spaces at the ends."""
        return self.predicted.strip() == self.expected.strip()


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of right answers and of questions.

    Attributes:
      right: number of right answers.
      total: number of questions.
    """

    right: int
    total: int

    @classmethod
    def of(cls, answers: list[Answer]) -> "Tally":
        """Counts the right answers."""
        return cls(sum(answer.is_right for answer in answers), len(answers))

    @property
    def exact_match(self) -> float:
        """Share of right answers; nan if there are no questions."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval."""
        if not self.total:
            return 0.0, 1.0  # Nothing is known without questions.
        # Wilson (1927): the shares at which a score test at the 5 % level would just not reject the observed one.
        share, weight = self.right / self.total, _Z**2 / self.total
        middle = share + weight / 2
        spread = _Z * math.sqrt(share * (1 - share) / self.total + weight / (4 * self.total))
        return max(0.0, (middle - spread) / (1 + weight)), min(1.0, (middle + spread) / (1 + weight))

    def to_json(self) -> dict:
        """Returns the share, its interval and the counts."""
        low, high = self.interval
        return {
            "exact_match": round(self.exact_match, 4) if self.total else None,
            "interval_95": [round(low, 4), round(high, 4)],
            "num_right": self.right,
            "num_questions": self.total,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """Answers and scores of one evaluation.

    Attributes:
      answers: answers in the order of the data set.
      unseen_fonts: fonts that are not in the training data; they get a row of their own.
      control: replacement of the images ("none", "blank", "wrong").
      seconds: duration of the evaluation.
    """

    answers: list[Answer]
    unseen_fonts: tuple[str, ...]
    control: str
    seconds: float

    @property
    def overall(self) -> Tally:
        """Tally of all questions."""
        return Tally.of(self.answers)

    @property
    def per_family(self) -> dict[str, Tally]:
        """Tally of each family of documents."""
        families = sorted({answer.family for answer in self.answers})
        return {family: Tally.of([a for a in self.answers if a.family == family]) for family in families}

    @property
    def groups(self) -> dict[str, list[Answer]]:
        """Answers of each row of a table: each family, the unseen fonts and all questions."""
        families = sorted({answer.family for answer in self.answers})
        groups = {family: [answer for answer in self.answers if answer.family == family] for family in families}
        if unseen := [answer for answer in self.answers if answer.font in self.unseen_fonts]:
            groups["font not trained"] = unseen
        return {**groups, "all": self.answers}

    @property
    def warnings(self) -> dict[str, int]:
        """Number of answers with each kind of warning."""
        return count_warnings(answer.warnings for answer in self.answers)

    @property
    def unseen_font(self) -> Tally:
        """Tally of the pages in fonts that are not in the training data."""
        return Tally.of([answer for answer in self.answers if answer.font in self.unseen_fonts])

    def to_json(self) -> dict:
        """Returns the scores without the answers."""
        return {
            **self.overall.to_json(),
            "per_family": {family: tally.to_json() for family, tally in self.per_family.items()},
            "unseen_font": {"fonts": list(self.unseen_fonts), **self.unseen_font.to_json()},
            "num_documents": len({answer.document for answer in self.answers}),
            "control": self.control,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 1),
        }


def format_table(reports: dict[str, Report]) -> str:
    """Returns a table with a column per report, and rows for each family, the unseen fonts and all questions.

                     questions   held-out          blank image
    form                   240   0.90 [0.86-0.93]  0.00 [0.00-0.02]
    receipt                260   0.88 [0.84-0.92]  0.00 [0.00-0.01]
    font not trained       110   0.71 [0.62-0.79]  0.00 [0.00-0.03]
    all                    500   0.89 [0.86-0.91]  0.00 [0.00-0.01]
    """
    # All reports score the same questions, so the first one has the groups of all.
    first, *others = [report.groups for report in reports.values()]
    rows = {}
    for name, answers in first.items():
        tallies = [Tally.of(group) for group in (answers, *(groups[name] for groups in others))]
        cells = [format_interval(tally.exact_match, tally.interval) if tally.total else "-" for tally in tallies]
        rows[name] = len(answers), cells
    return format_rows(list(reports), rows)


def format_rows(titles: Sequence[str], rows: Mapping[str, tuple[int, Sequence[str]]]) -> str:
    """Returns a table of rows with a name, a number of questions, and a cell below each title."""
    # Columns are as wide as their title or the longest cell.
    widths = [max(len(title), len("0.00 [0.00-0.00]")) for title in titles]
    name_width = max(len(name) for name in rows)
    header = [f"{title:<{width}}" for title, width in zip(titles, widths, strict=True)]
    lines = ["  ".join([f"{'':<{name_width}}", "questions", *header]).rstrip()]
    for name, (count, cells) in rows.items():
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([f"{name:<{name_width}}", f"{count:>9}", *padded]).rstrip())
    return "\n".join(lines)


def format_interval(value: float, interval: tuple[float, float] | None) -> str:
    """Returns a score with its interval: "0.90 [0.86-0.93]"."""
    if interval is None:
        return f"{value:.2f}"
    low, high = interval
    return f"{value:.2f} [{low:.2f}-{high:.2f}]"
