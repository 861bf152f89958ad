"""Exact match, counted: how often, how sure, and as a table.

A `Tally` counts right answers. Its interval is Wilson's 95 % score interval, which stays inside [0, 1] and is honest
for few questions and for scores near 0 or 1 (for 0 right of 20 it says 0.00 to 0.16, not 0 to 0).
"""

import dataclasses
import math

_Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations.


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question, what the page says and what the model said.

    Attributes:
      document: id of the page.
      family: what kind of page it is.
      font: what it is printed in.
      question: what was asked.
      expected: the answer that counts.
      predicted: the model's.
    """

    document: str
    family: str
    font: str
    question: str
    expected: str
    predicted: str

    @property
    def is_right(self) -> bool:
        """Whether the two are the same text, spaces at the ends aside."""
        return self.predicted.strip() == self.expected.strip()


@dataclasses.dataclass(frozen=True)
class Tally:
    """`right` of `total`."""

    right: int
    total: int

    @classmethod
    def of(cls, answers: list[Answer]) -> "Tally":
        """Counts the right ones."""
        return cls(sum(answer.is_right for answer in answers), len(answers))

    @property
    def exact_match(self) -> float:
        """The share that is right; nan of nothing."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval."""
        if not self.total:
            return 0.0, 1.0
        share, weight = self.right / self.total, _Z**2 / self.total
        middle = share + weight / 2
        spread = _Z * math.sqrt(share * (1 - share) / self.total + weight / (4 * self.total))
        return max(0.0, (middle - spread) / (1 + weight)), min(1.0, (middle + spread) / (1 + weight))

    def to_json(self) -> dict:
        low, high = self.interval
        return {
            "exact_match": round(self.exact_match, 4) if self.total else None,
            "interval_95": [round(low, 4), round(high, 4)],
            "num_right": self.right,
            "num_questions": self.total,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """The answers of one evaluation and what they add up to.

    Attributes:
      answers: in the order of the data set.
      unseen_fonts: fonts that training never saw; they get a row of their own.
      control: what was done to the images ("none", "blank", "wrong").
      seconds: how long it took.
    """

    answers: list[Answer]
    unseen_fonts: tuple[str, ...]
    control: str
    seconds: float

    @property
    def overall(self) -> Tally:
        """All questions."""
        return Tally.of(self.answers)

    @property
    def per_family(self) -> dict[str, Tally]:
        """The questions on each family of documents."""
        families = sorted({answer.family for answer in self.answers})
        return {family: Tally.of([a for a in self.answers if a.family == family]) for family in families}

    @property
    def unseen_font(self) -> Tally:
        """The questions on pages in fonts that training never saw."""
        return Tally.of([answer for answer in self.answers if answer.font in self.unseen_fonts])

    def to_json(self) -> dict:
        """The figures, without the answers."""
        return {
            **self.overall.to_json(),
            "per_family": {family: tally.to_json() for family, tally in self.per_family.items()},
            "unseen_font": {"fonts": list(self.unseen_fonts), **self.unseen_font.to_json()},
            "num_documents": len({answer.document for answer in self.answers}),
            "control": self.control,
            "seconds": round(self.seconds, 1),
        }


def format_table(reports: dict[str, Report]) -> str:
    """Reports side by side: a row a family, one for the unseen font, one for all; a column a report.

                     questions   held-out          blank image
    form                   240   0.90 [0.86-0.93]  0.00 [0.00-0.02]
    receipt                260   0.88 [0.84-0.92]  0.00 [0.00-0.01]
    font not trained       110   0.71 [0.62-0.79]  0.00 [0.00-0.03]
    all                    500   0.89 [0.86-0.91]  0.00 [0.00-0.01]
    """
    first = next(iter(reports.values()))
    rows = {family: [report.per_family[family] for report in reports.values()] for family in first.per_family}
    if first.unseen_font.total:
        rows["font not trained"] = [report.unseen_font for report in reports.values()]
    rows["all"] = [report.overall for report in reports.values()]

    widths = [max(len(name), len("0.00 [0.00-0.00]")) for name in reports]
    name_width = max(len(name) for name in rows)
    header = [f"{name:<{width}}" for name, width in zip(reports, widths, strict=True)]
    lines = ["  ".join([f"{'':<{name_width}}", "questions", *header]).rstrip()]
    for name, tallies in rows.items():
        cells = [f"{_format(tally):<{width}}" for tally, width in zip(tallies, widths, strict=True)]
        lines.append("  ".join([f"{name:<{name_width}}", f"{tallies[0].total:>9}", *cells]).rstrip())
    return "\n".join(lines)


def _format(tally: Tally) -> str:
    low, high = tally.interval
    return f"{tally.exact_match:.2f} [{low:.2f}-{high:.2f}]" if tally.total else "-"
