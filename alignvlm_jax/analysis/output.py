"""What an analysis leaves: figures as JSON, a picture, and a paragraph that reads the picture.

    OUT/noise.json, OUT/noise.png, OUT/noise.md

Each file is written beside its name first. Pictures are drawn to be told apart in grey too: every line has a marker and
a dash pattern of its own, every axis its unit.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally

# From dark to light, so that order survives a grey printer; the dash patterns and markers differ as well.
_COLOURS = ("#000000", "#0b5394", "#c55a11", "#6aa84f", "#a679c0", "#b7a100")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DPI = 110


def line_style(number: int) -> dict[str, Any]:
    """How line `number` of a picture looks, for `Axes.plot` and `Axes.errorbar`."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
    }


def picture(columns: int, rows: int = 1, *, title: str) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """An empty picture of so many panels, row by row."""
    figure = matplotlib.figure.Figure(figsize=(4.6 * columns, 3.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in axes:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def plot_scores(axes: Axes, x: list[float], scores: list[Tally], *, label: str, style: dict[str, Any]) -> None:
    """Exact match in percent with its 95 % interval."""
    y = [100 * score.exact_match for score in scores]
    bars = [
        [100 * (score.exact_match - score.interval[0]) for score in scores],
        [100 * (score.interval[1] - score.exact_match) for score in scores],
    ]
    axes.errorbar(x, y, yerr=bars, label=label, capsize=2.5, elinewidth=0.8, linewidth=1.4, **style)
    axes.set_ylabel("exact match (%), 95 % interval")
    axes.set_ylim(-3, 103)


def percent(score: Tally) -> str:
    """A score in words: "78.9 % [76.4-81.3]"."""
    low, high = score.interval
    return f"{100 * score.exact_match:.1f} % [{100 * low:.1f}-{100 * high:.1f}]"


def check_folder(out: str | Path) -> None:
    """Finds out whether `write` can write there, before long work; makes nothing.

    Raises:
      UserError: the folder cannot be written to.
    """
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({folder}: {error.strerror or error})") from error


def write(
    out: str | Path,
    name: str,
    *,
    figures: dict[str, Any],
    pictures: dict[str, matplotlib.figure.Figure],
    text: str,
) -> None:
    """Writes OUT/NAME.json, OUT/NAME.md and the pictures (OUT/KEY.png), and says where they are.

    Raises:
      UserError: the folder cannot be written to.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key, drawn in pictures.items():
            scratch = out / f".{key}.png"
            drawn.savefig(scratch, format="png", dpi=_DPI, metadata={"Software": None})
            scratch.rename(out / f"{key}.png")
        for file, content in (
            (f"{name}.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n"),
            (f"{name}.md", text),
        ):
            (out / f".{file}").write_text(content, encoding="utf-8")
            (out / f".{file}").rename(out / file)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    print(text)
    print(f"written: {out}/{name}.json, {name}.md, {', '.join(f'{key}.png' for key in pictures)}")
