"""The report's plots: told apart by markers, dashes and hatches, so that they can be read in grey; intervals drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from alignvlm_jax.reproduce.options import TITLES
from alignvlm_jax.reproduce.statistics import Estimate

# By connector, in the order of the tables: a marker, a line and a grey each.
_STYLES = {
    title: dict(marker=marker, linestyle=line, color=colour)
    for title, marker, line, colour in zip(
        TITLES.values(),
        "osD^vP",
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))),
        ("#000000", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e"),
        strict=True,
    )
}
_HATCHES = ("", "///", "...", "xx")
_SIZE = (5.2, 3.4)  # inches, of one panel


def bars(file: Path, groups: Mapping[str, Mapping[str, Estimate]], label: str) -> None:
    """For each name, a bar in each group, with its interval."""
    groups = {title: values for title, values in groups.items() if values}
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = plt.subplots(figsize=(1.1 * max(len(names), 4) + 1, 3.6), layout="constrained")
    width = 0.8 / len(groups)
    for index, (title, values) in enumerate(groups.items()):
        places = [names.index(name) + (index - (len(groups) - 1) / 2) * width for name in values]
        means = [value.mean for value in values.values()]
        low = [value.mean - value.low for value in values.values()]
        high = [value.high - value.mean for value in values.values()]
        axes.bar(
            places,
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
    """A panel for each title, a curve for each name: x and y, where y may have intervals."""
    figure, row = plt.subplots(
        1, len(panels), figsize=(_SIZE[0] * len(panels), _SIZE[1]), sharey=True, squeeze=False, layout="constrained"
    )
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
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(StrMethodFormatter("{x:g}"))
    row[0][0].set_ylabel(y_label)
    row[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, file)


def _curve(axes: Axes, name: str, x: Sequence[float], y: Sequence[float | Estimate]) -> None:
    style = _STYLES.get(name, {"marker": "o"})
    means = [value.mean if isinstance(value, Estimate) else value for value in y]
    axes.plot(x, means, label=name, markersize=4, linewidth=1.2, **style)
    if y and isinstance(y[0], Estimate):
        spread = [[value.mean - value.low for value in y], [value.high - value.mean for value in y]]
        axes.errorbar(x, means, spread, fmt="none", capsize=2, linewidth=0.8, ecolor=style.get("color"))


def _save(figure: plt.Figure, file: Path) -> None:
    """Whole or not at all; the same figures give the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}")
    with plt.rc_context({"svg.hashsalt": "reproduce"}):
        figure.savefig(new, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    new.replace(file)
