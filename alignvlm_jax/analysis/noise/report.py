"""JSON, plots and text of the noise analysis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import matplotlib.figure

from alignvlm_jax.analysis import output
from alignvlm_jax.analysis.noise.corruptions import CORRUPTIONS
from alignvlm_jax.analysis.noise.measure import CorruptionPoint, NoisePoint
from alignvlm_jax.evaluation.report import Tally

PAPER_SIGMA = 3.0


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """Measurements of one checkpoint.

    Attributes:
      features: points under feature noise, in ascending order of sigma; the first is without noise.
      images: points on corrupted pages.
    """

    features: list[NoisePoint]
    images: list[CorruptionPoint]

    @property
    def clean(self) -> Tally:
        """Right answers and questions without noise."""
        return self.features[0].tally


def to_json(reports: Mapping[str, NoiseReport]) -> dict[str, Any]:
    """Returns the points of all checkpoints as JSON values."""
    return {
        "features": {name: [point.to_json() for point in report.features] for name, report in reports.items()},
        "images": {name: [point.to_json() for point in report.images] for name, report in reports.items()},
    }


def plot_features(reports: Mapping[str, NoiseReport]) -> matplotlib.figure.Figure:
    """Plots score and distances against sigma, one line per checkpoint."""
    questions = next(iter(reports.values())).clean.total
    figure, (scores, distances) = output.new_plot(
        2, title=f"Gaussian noise on the vision features before the connector ({questions} questions)"
    )
    for number, (name, report) in enumerate(reports.items()):
        style, sigmas = output.line_style(number), [point.sigma for point in report.features]
        output.plot_scores(scores, sigmas, [point.tally for point in report.features], label=name, style=style)
        # Filled markers are the paper's distance, hollow ones the distance after subtracting the mean token.
        plain = [point.cosine_distance for point in report.features]
        distances.plot(sigmas, plain, label=name, linewidth=1.4, **style)
        centered = [point.token_centred_cosine_distance for point in report.features]
        hollow = {**style, "markerfacecolor": "white", "linewidth": 0.9}
        distances.plot(sigmas, centered, label=f"{name}, minus the mean token", **hollow)
    distances.set_ylabel("mean cosine distance of visual tokens, 0-2")
    for axes in (scores, distances):
        axes.set_xlabel("sigma of the noise (units of the features)")
        axes.legend(fontsize=8)
    return figure


def plot_images(reports: Mapping[str, NoiseReport]) -> matplotlib.figure.Figure:
    """Plots the score against the level of corruption, one panel per kind."""
    kinds = list(dict.fromkeys(point.corruption.kind for report in reports.values() for point in report.images))
    figure, panels = output.new_plot(min(2, len(kinds)), -(-len(kinds) // 2), title="Noise on the page itself")
    for axes, kind in zip(panels, kinds, strict=False):
        for number, (name, report) in enumerate(reports.items()):
            points = [(CORRUPTIONS[kind].clean, report.clean)]
            points += [(p.corruption.level, p.tally) for p in report.images if p.corruption.kind == kind]
            # The point without corruption may be at either end of the axis.
            levels, tallies = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            output.plot_scores(axes, list(levels), list(tallies), label=name, style=output.line_style(number))
        if CORRUPTIONS[kind].clean:
            axes.invert_xaxis()  # corruption grows to the right in every panel
        axes.set_xlabel(CORRUPTIONS[kind].axis)
        axes.legend(fontsize=8)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    return figure


def describe(reports: Mapping[str, NoiseReport], split: str) -> str:
    """Returns Markdown that states what the plots show."""
    # A paragraph per checkpoint: the score without noise, at about the paper's sigma, and where it halves.
    lines = ["# Noise", "", "![](noise.png)", ""]
    for name, report in reports.items():
        shown = min(report.features[1:], key=lambda point: abs(point.sigma - PAPER_SIGMA), default=None)
        lines.append(
            f"**{name}** answers {output.percent(report.clean)} of {report.clean.total} questions of split {split!r} "
            "right without noise."
        )
        if shown is not None:
            change = 100 * (shown.score - report.clean.exact_match)
            lines.append(
                f"Noise of sigma {shown.sigma:g} on the features is {shown.relative_sigma:.2f} times their own "
                f"standard deviation. Under it the score is {output.percent(shown.tally)}, a change of {change:+.1f} "
                "points. The mean cosine distance of its visual tokens from themselves without noise is "
                f"{shown.cosine_distance:.4f}. It is {shown.centred_cosine_distance:.4f} once the mean text embedding "
                f"is subtracted from both, and {shown.token_centred_cosine_distance:.4f} once the mean visual token is."
            )
        if shown is not None and report.clean.right:
            half = next((point for point in report.features if point.score < report.clean.exact_match / 2), None)
            lines.append(
                f"It loses half of its score at sigma {half.sigma:g}."
                if half
                else f"It keeps at least half of its score up to sigma {report.features[-1].sigma:g}, the largest."
            )
        lines.append("")
    lines += _compare(reports)
    lines += [
        "Sigma has the unit of the features, which differs between encoders. Compare checkpoints of different encoders "
        "by sigma divided by the standard deviation of the features. The paper (3B models, nine benchmarks, sigma 3) "
        "reports a change of -1.67 points and a distance of 0.0036 for ALIGN, and -25.54 and 0.3938 for an MLP.",
        "",
    ]
    # A paragraph about the pages themselves, with the lowest score of each kind of corruption.
    if any(report.images for report in reports.values()):
        lines += ["![](noise_images.png)", ""]
        for name, report in reports.items():
            worst: dict[str, CorruptionPoint] = {}
            for point in report.images:
                previous = worst.get(point.corruption.kind, point)
                worst[point.corruption.kind] = min(previous, point, key=lambda point: point.tally.exact_match)
            scores = [f"{output.percent(p.tally)} under {kind} {p.corruption.level:g}" for kind, p in worst.items()]
            lines.append(f"Noise on the page itself: the worst scores of **{name}** are {', '.join(scores)}.")
        lines.append("")
    return "\n".join(lines)


def _compare(reports: Mapping[str, NoiseReport]) -> list[str]:
    """Returns text that ranks checkpoints with a score above 0 by their loss, or nothing if there are fewer than two.

    They are compared at the sigma closest to the standard deviation of the features, and at the one closest to the
    paper's sigma, at which a small model may have lost its whole score.
    """
    able = {name: report for name, report in reports.items() if report.clean.right and len(report.features) > 1}
    if len(able) < 2:
        return []
    noisy_points = next(iter(able.values())).features[1:]
    indices = {
        min(range(len(noisy_points)), key=lambda i: abs(noisy_points[i].relative_sigma - 1)),
        min(range(len(noisy_points)), key=lambda i: abs(noisy_points[i].sigma - PAPER_SIGMA)),
    }
    # One line per sigma; the two indices may be the same.
    lines = []
    for index in sorted(indices):
        changes = {
            name: 100 * (report.features[1 + index].score - report.clean.exact_match) for name, report in able.items()
        }
        order = sorted(changes, key=lambda name: -changes[name])
        ranking = ", ".join(f"{name} {changes[name]:+.1f} points" for name in order)
        lines.append(
            f"Side by side at sigma {noisy_points[index].sigma:g}, from the smallest loss to the largest: {ranking}."
        )
    return [*lines, ""]
