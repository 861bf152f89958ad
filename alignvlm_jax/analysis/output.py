"""Files that an analysis writes: results as JSON, plots, and a paragraph that describes the plots.

    OUT/noise.json, OUT/noise.png, OUT/noise.md

Plots stay readable in grayscale: every line has its own marker and dash pattern, and every axis names its unit.
"""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes

from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.locations import open_location
from alignvlm_jax.output_files import write_atomically

# From dark to light, so that a grayscale print keeps the order of the lines.
_COLORS = ("#000000", "#0b5394", "#c55a11", "#6aa84f", "#a679c0", "#b7a100")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DPI = 110


def line_style(number: int) -> dict[str, Any]:
    """Returns the style of line `number`, as keyword arguments of `Axes.plot` and `Axes.errorbar`."""
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
    }


def new_plot(columns: int, rows: int = 1, *, title: str) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """Returns an empty figure and its panels, row by row."""
    figure = matplotlib.figure.Figure(figsize=(4.6 * columns, 3.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in axes:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def plot_scores(axes: Axes, x: list[float], scores: list[Tally], *, label: str, style: dict[str, Any]) -> None:
    """Plots exact match in percent with its 95 % interval."""
    y = [100 * score.exact_match for score in scores]
    # Matplotlib takes the distances from the value to the ends of the interval, not the ends themselves.
    bars = [
        [100 * (score.exact_match - score.interval[0]) for score in scores],
        [100 * (score.interval[1] - score.exact_match) for score in scores],
    ]
    axes.errorbar(x, y, yerr=bars, label=label, capsize=2.5, elinewidth=0.8, linewidth=1.4, **style)
    axes.set_ylabel("exact match (%), 95 % interval")
    axes.set_ylim(-3, 103)


def percent(score: Tally) -> str:
    """Returns a score as text: "78.9 % [76.4-81.3]"."""
    low, high = score.interval
    return f"{100 * score.exact_match:.1f} % [{100 * low:.1f}-{100 * high:.1f}]"


def write(
    out: str | Path,
    name: str,
    *,
    results: dict[str, Any],
    plots: dict[str, matplotlib.figure.Figure],
    text: str,
) -> None:
    """Writes OUT/NAME.json, OUT/NAME.md and the plots (OUT/KEY.png), and prints the text and the paths.

    Raises:
      UserError: if the folder is not writable.
    """
    folder = open_location(out)
    for key, plot in plots.items():
        image = io.BytesIO()
        plot.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})
        write_atomically(folder / f"{key}.png", image.getvalue())
    write_atomically(folder / f"{name}.json", (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    write_atomically(folder / f"{name}.md", text.encode())
    print(text)
    print(f"written: {out}/{name}.json, {name}.md, {', '.join(f'{key}.png' for key in plots)}")
