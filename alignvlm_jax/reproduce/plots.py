"""Plots of the report, with intervals. Markers, dashes and hatches keep them readable in grayscale."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from alignvlm_jax.reproduce.options import TITLES
from alignvlm_jax.reproduce.statistics import Estimate

# Marker, line and color of each connector, in the order of the tables.
_STYLES = {
    title: dict(marker=marker, linestyle=line, color=color)
    for title, marker, line, color in zip(
        TITLES.values(),
        "osD^vP",
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))),
        ("#000000", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e"),
        strict=True,
    )
}
_HATCHES = ("", "///", "...", "xx")
_PANEL_SIZE = (5.2, 3.4)  # inches


def bars(file: Path, groups: Mapping[str, Mapping[str, Estimate]], label: str) -> None:
    """Plots one bar per name and group, with its interval."""
    groups = {title: values for title, values in groups.items() if values}
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = plt.subplots(figsize=(1.1 * max(len(names), 4) + 1, 3.6), layout="constrained")
    width = 0.8 / len(groups)
    for index, (title, values) in enumerate(groups.items()):
        # The bars of a name stand next to each other, centered on its tick.
        positions = [names.index(name) + (index - (len(groups) - 1) / 2) * width for name in values]
        means = [value.mean for value in values.values()]
        low = [value.mean - value.low for value in values.values()]
        high = [value.high - value.mean for value in values.values()]
        # Gray levels and hatches tell the groups apart in print.
        axes.bar(
            positions,
            means,
            width * 0.92,
            yerr=(low, high),
            capsize=3,
            label=title,
            edgecolor="black",
            color=str(0.85 - 0.35 * index),
            hatch=_HATCHES[index % len(_HATCHES)],
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.0 + 0.09 * len(groups)))
    _save(figure, file)


def curves(
    file: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float | Estimate]]]],
    x_label: str,
    y_label: str,
    *,
    logarithmic: tuple[bool, bool] = (False, False),
) -> None:
    """Plots one panel per title, with one curve per name, given as x and y. The values of y may have intervals."""
    figure, row = plt.subplots(
        1,
        len(panels),
        figsize=(_PANEL_SIZE[0] * len(panels), _PANEL_SIZE[1]),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    # The panels share the y axis and one legend, to the right of the last panel.
    for axes, (title, by_name) in zip(row[0], panels.items(), strict=True):
        for name, (x, y) in by_name.items():
            _curve(axes, name, x, y)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label)
        axes.grid(color="0.9")
        if logarithmic[0]:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if logarithmic[1]:
            axes.set_yscale("log")
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter(StrMethodFormatter("{x:g}"))
    row[0][0].set_ylabel(y_label)
    row[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, file)


def _curve(axes: Axes, name: str, x: Sequence[float], y: Sequence[float | Estimate]) -> None:
    style = _STYLES.get(name, {"marker": "o"})
    means = [value.mean if isinstance(value, Estimate) else value for value in y]
    axes.plot(x, means, label=name, markersize=4, linewidth=1.2, **style)
    if y and isinstance(y[0], Estimate):
        # Matplotlib takes the distances from the value to the ends of the interval.
        spread = [[value.mean - value.low for value in y], [value.high - value.mean for value in y]]
        axes.errorbar(x, means, spread, fmt="none", capsize=2, linewidth=0.8, ecolor=style.get("color"))


def _save(figure: plt.Figure, file: Path) -> None:
    """Writes the file atomically. The same plot gives the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    # A fixed salt and no date make SVG files reproducible.
    with plt.rc_context({"svg.hashsalt": "reproduce"}):
        figure.savefig(temporary, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    temporary.replace(file)
