"""JSON, plot and text of the vocabulary analysis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from alignvlm_jax.analysis import output
from alignvlm_jax.analysis.vocabulary.measure import MASSES, THRESHOLD, VocabularyPoint, VocabularyUse

PAPER_TOP = 0.0118
PAPER_KEPT = 3400


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """Measurements of one checkpoint.

    Attributes:
      use: use of the words.
      top_words: most used words as text, with their mean probabilities.
      full: scores in ascending order of the number of words, with the LN_V statistics of all words.
      kept: the same with the LN_V statistics of the kept words.
    """

    use: VocabularyUse
    top_words: list[tuple[str, float]]
    full: list[VocabularyPoint]
    kept: list[VocabularyPoint]

    @property
    def unpruned(self) -> VocabularyPoint | None:
        """The score with all words, or None if it was not measured."""
        return self.full[-1] if self.full and self.full[-1].words == len(self.use.mean) else None

    def to_json(self) -> dict[str, Any]:
        """Returns the measurements as JSON values."""
        use = self.use
        return {
            "pages": use.pages,
            "patches": use.patches,
            "vocabulary": len(use.mean),
            "effective_words_of_mean": round(use.effective_of_mean, 3),
            "effective_words_per_patch": round(use.effective_per_patch, 4),
            "words_for_mass": {str(mass): use.words_for(mass) for mass in MASSES},
            f"words_above_{THRESHOLD:g}": use.words_above(),
            "top_words": [{"word": word, "probability": round(p, 6)} for word, p in self.top_words],
            "curve": [point.to_json() for point in (*self.full, *self.kept)],
        }


def plot(reports: Mapping[str, VocabularyReport]) -> matplotlib.figure.Figure:
    """Plots the mass by number of words, the scores of pruned models, and the first checkpoint's top words."""
    figure, (mass, scores, words) = output.new_plot(3, title="The words that ALIGN uses")
    for number, (name, report) in enumerate(reports.items()):
        style = output.line_style(number)
        _plot_mass(mass, report.use, name, style)
        for curve, label in ((report.full, name), (report.kept, f"{name}, statistics of the words kept")):
            hollow = {} if curve is report.full else {"markerfacecolor": "white"}
            sizes, tallies = [point.words for point in curve], [point.tally for point in curve]
            if curve:
                output.plot_scores(scores, sizes, tallies, label=label, style={**style, **hollow})
    # Logarithmic axes with plain numbers as labels.
    mass.set(xscale="log", yscale="log", ylim=(1e-7, 1.5), xlabel="words, the most used first")
    mass.set_ylabel("share of the mass of P on all other words")
    scores.set(xscale="log", xlabel="words kept")
    for axes in (mass, scores):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is scores else (1,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    name, report = next(iter(reports.items()))
    _plot_top_words(words, report.top_words, name)
    return figure


def _plot_mass(axes: Axes, use: VocabularyUse, name: str, style: dict[str, Any]) -> None:
    """Plots the mass that remains outside the most used words, with a marker at each of `MASSES`."""
    # Clip from below, because 0 has no position on a logarithmic axis.
    remaining = np.maximum(1 - np.cumsum(use.shares), 1e-7)
    axes.plot(
        np.arange(1, len(remaining) + 1), remaining, label=name, color=style["color"], linestyle=style["linestyle"]
    )
    for share in MASSES:
        axes.plot(use.words_for(share), 1 - share, color=style["color"], marker=style["marker"])


def _plot_top_words(axes: Axes, top_words: list[tuple[str, float]], name: str) -> None:
    # Control characters and partial characters are shown escaped.
    labels = [ascii(word)[1:-1] if not word.isprintable() else f"\u201c{word}\u201d" for word, _ in top_words]
    rows = np.arange(len(labels))[::-1]
    axes.barh(rows, [100 * p for _, p in top_words], color="#7f7f7f")
    axes.set_yticks(rows, labels, fontsize=7)
    axes.set_xlabel(f"mean probability (%), {name}")


def describe(reports: Mapping[str, VocabularyReport], usage_split: str, split: str) -> str:
    """Returns Markdown that states what the plot shows."""
    lines = ["# Vocabulary", "", "![](vocabulary.png)", ""]
    for name, report in reports.items():
        lines += [_describe_use(name, report, usage_split), "", *_describe_scores(report, split)]
    lines += [
        f"In the paper (3B, 128,256 words, 100 pages) the most used word has {PAPER_TOP}, about {PAPER_KEPT:,} words "
        f"are above {THRESHOLD:g}, and pruning to those words costs 0.12 points.",
        "",
    ]
    return "\n".join(lines)


def _describe_use(name: str, report: VocabularyReport, usage_split: str) -> str:
    use, (word, probability) = report.use, report.top_words[0]
    counts = [f"{use.words_for(mass):,} words carry {100 * mass:g} %" for mass in MASSES]
    return (
        f"**{name}**, over {use.patches:,} patches of {use.pages} pages of split {usage_split!r}: a patch is made of "
        f"{use.effective_per_patch:.2f} words on average (exp of the entropy of P), and all patches together of "
        f"{use.effective_of_mean:.1f} of {len(use.mean):,}. Of the mass of the mean P, {', '.join(counts)}; "
        f"{use.words_above():,} words have more than {THRESHOLD:g}. The most used word is {word!r} with "
        f"{probability:.4f}."
    )


def _describe_scores(report: VocabularyReport, split: str) -> list[str]:
    unpruned = report.unpruned
    if unpruned is None or len(report.full) < 2:
        return []
    # Points are in ascending order of size, and the model with all words always qualifies.
    smallest = next(point for point in report.full if point.tally.interval[1] >= unpruned.score)
    lines = [
        f"With all {unpruned.words:,} words, {output.percent(unpruned.tally)} of {unpruned.tally.total} questions of "
        f"split {split!r} are answered right. "
        + (
            "No pruned model reaches that score within its 95 % interval."
            if smallest is unpruned
            else "The smallest pruned model whose 95 % interval still reaches that has "
            f"{smallest.words:,} words and answers {output.percent(smallest.tally)}."
        ),
    ]
    # The two curves at the sizes that both have.
    pairs = [(full, kept) for full in report.full for kept in report.kept if full.words == kept.words]
    if pairs:
        full, kept = max(pairs, key=lambda pair: abs(pair[0].score - pair[1].score))
        lines.append(
            "The LN_V statistics of the kept words alone, instead of all words, change the score most at "
            f"{full.words:,} words: {output.percent(kept.tally)} instead of {output.percent(full.tally)}."
        )
    return [*lines, ""]
