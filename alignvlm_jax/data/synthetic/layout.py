"""Layout of a page before it is rendered: text at its positions, with rules, bars and curves around it.

Coordinates are px from the top left of the *content*; `document.py` adds margins and rotation afterwards. Text is added
in reading order, line by line, because the transcription is made from it.
"""

import dataclasses
from collections.abc import Sequence

from alignvlm_jax.data.synthetic.dice import Dice
from alignvlm_jax.data.synthetic.fonts import Face


@dataclasses.dataclass(frozen=True)
class Run:
    """Continuous text whose pen starts at (x, baseline)."""

    text: str
    x: float
    baseline: float


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape drawn under the text.

    Attributes:
      kind: "line" (through points), "fill" or "frame" (two corners) or "dot" (center and radius).
      points: coordinates of the points, x and y alternating; a dot has x, y and its radius.
      color: "rule" (ink), "faint" (a light ink), "mark" (bars, curves), "band" (a light mark) or "paper". A dot is
        always drawn in ink.
      width: width of a line in px.
    """

    kind: str
    points: tuple[float, ...]
    color: str = "rule"
    width: int = 1


class Page:
    """Collects text and shapes from the top down, within a given width."""

    def __init__(self, dice: Dice, face: Face, width: float, pitch: float):
        self.dice = dice
        self.face = face
        self.width = width
        self.pitch = pitch
        self.y = 0.0
        self.runs: list[Run] = []
        self.shapes: list[Shape] = []
        self.lines: list[str] = []

    def fits(self, *texts: str) -> bool:
        """Returns whether these texts fit side by side, with a space between them."""
        return self.room(*texts) + self.face.space >= 0

    def room(self, *texts: str) -> float:
        """Returns the width that these texts leave on their line for one more."""
        face = self.face
        return self.width - sum([face.width(text) + face.space for text in texts])

    def print_text(self, text: str, x: float, baseline: float) -> None:
        """Prints text at a position, without changing the cursor or the transcription."""
        self.runs.append(Run(text, x, baseline))

    def next_baseline(self) -> float:
        """Moves the cursor down by one line and returns its baseline; capitals are in the middle of the pitch."""
        baseline = self.y + (self.pitch + self.face.cap_height) / 2
        self.y += self.pitch
        return baseline

    def line(self, *cells: tuple[str, float]) -> None:
        """Prints a line of (text, x) cells, from left to right."""
        baseline = self.next_baseline()
        for text, x in cells:
            self.runs.append(Run(text, x, baseline))
        self.lines.append(" ".join([text for text, _ in cells]))

    def aligned(self, text: str, where: float) -> tuple[str, float]:
        """Returns a cell at the left (0), in the middle (0.5) or at the right (1) of the page, or anywhere between."""
        return text, where * (self.width - self.face.width(text))

    def spread(self, left: str, right: str) -> None:
        """Prints one text at the left and one at the right of the same line."""
        self.line((left, 0.0), self.aligned(right, 1.0))

    def gap(self, low: float, high: float) -> None:
        """Moves the cursor down by a random distance."""
        self.y += self.dice.uniform(low, high)

    def rule(self, style: str | None = None) -> None:
        """Draws a separator: "solid", "double", "dashed", "dotted" or "blank"; None draws one at random."""
        style = style or self.dice.pick(("solid", "double", "dashed", "dotted", "blank"))
        y = self.y + 2.0
        if style in ("solid", "double"):
            self.shapes.append(Shape("line", (0.0, y, self.width, y), "faint" if self.dice.chance(0.3) else "rule"))
        if style == "double":
            self.shapes.append(Shape("line", (0.0, y + 2, self.width, y + 2)))
        if style in ("dashed", "dotted"):
            period, mark = (6, 3) if style == "dashed" else (3, 0)
            x = 0.0
            while x + mark <= self.width:
                self.shapes.append(Shape("line", (x, y, x + mark, y)))
                x += period
        self.y += 6.0 if style == "double" else 4.0

    def columns(self, rows: Sequence[Sequence[str]], last_right: bool) -> list[list[float]] | None:
        """Returns the start of each cell of a grid, with columns spread over the page, or None if they do not fit.

        The first column is aligned left, all others either right or left.
        """
        # The widest cell of each column determines its width; the rest of the page is divided among the gaps.
        widths = [[self.face.width(cell) for cell in row] for row in rows]
        column_widths = [max(column) for column in zip(*widths, strict=True)]
        spare = self.width - sum(column_widths)
        gaps = len(column_widths) - 1
        if spare < self.face.space * gaps:
            return None
        gap = spare / gaps if gaps else 0.0
        starts = [sum(column_widths[:c]) + gap * c for c in range(len(column_widths))]
        return [
            [starts[c] + (column_widths[c] - width if last_right and c else 0.0) for c, width in enumerate(row_widths)]
            for row_widths in widths
        ]
