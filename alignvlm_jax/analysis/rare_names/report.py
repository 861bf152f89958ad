"""Reports the rare-names analysis as a plot and as text."""

from typing import Any

import matplotlib.figure
import numpy as np

from alignvlm_jax.analysis import output
from alignvlm_jax.analysis.rare_names.measure import COMMON
from alignvlm_jax.data.synthetic.names import COUNTS


def plot(models: dict[str, dict[str, Any]]) -> matplotlib.figure.Figure:
    """Plots the error rate against rarity, one line per model: look-alikes on the left, loners on the right.

    Args:
      models: the result of `measure.summarize` for each model, by name.
    """
    figure, axes = output.new_plot(2, title="Names answered wrong, by number of training pages that print them")
    for axis, subset in zip(axes, ("look-alikes", "loners"), strict=True):
        for number, (name, summary) in enumerate(models.items()):
            rows = [row for row in summary[subset]["by_count"] if row["questions"]]
            # Shift the lines slightly against each other, so that their error bars do not overlap.
            x = [COUNTS.index(row["seen"]) + 0.08 * (number - (len(models) - 1) / 2) for row in rows]
            y, low, high = (np.array([100 * row["error"][key] for row in rows]) for key in ("value", "low", "high"))
            # An estimate can be just outside its interval, and matplotlib rejects negative error bars.
            bars = np.maximum([y - low, high - y], 0)
            axis.errorbar(x, y, yerr=bars, label=name, capsize=2.5, elinewidth=0.8, **output.line_style(number))
        axis.set_title("with look-alikes" if subset == "look-alikes" else "without look-alikes", fontsize=10)
        axis.set_xticks(range(len(COUNTS)), COUNTS)
        axis.set_xlabel("training pages that print the name")
        axis.set_ylabel("wrong answers (%), 95 % interval")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure


def describe_comparison(first: str, comparisons: dict[str, dict[str, Any]]) -> str:
    """Returns the results of `measure.compare` as text."""
    return " ".join(
        f"The error of {name} differs from that of {first} by {_points(difference['error'])}: by "
        f"{_points(difference['error_on_rare'])} on names seen at most once, and by "
        f"{_points(difference['error_on_common'])} on names seen {COMMON[0]} times or more; its rarity gap is wider "
        f"by {_points(difference['rarity_gap'])}."
        for name, difference in comparisons.items()
    )


def describe(results: dict[str, Any]) -> str:
    """Returns the results of one model (`run.analyze`) as text."""
    overall, look_alikes = results["model"]["all"], results["model"]["look-alikes"]
    rarest, commonest = overall["by_count"][0], overall["by_count"][-1]
    pull, endings = look_alikes["pull"], overall["pull_of_endings"]
    # First the error and the rarity gap, then the pull among look-alikes, then the pull of endings.
    text = [
        f"Of {overall['questions']} questions that ask for names, {_percent(overall['error'])} are answered wrong. For "
        f"names never seen in training the error is {_percent(rarest['error'])}, and for names seen "
        f"{commonest['seen']} times it is {_percent(commonest['error'])}. The rarity gap, the error on names seen at "
        f"most once minus that on names seen {COMMON[0]} times or more, is {_points(overall['rarity_gap'])} "
        f"({_points(look_alikes['rarity_gap'])} among look-alikes); {_verdict(overall['rarity_gap'], 0)}.",
        f"Of the names that were mistaken for a look-alike, {pull['commoner']} were mistaken for a more common one and "
        f"{pull['rarer']} for a rarer one"
        + (f" ({_percent(pull)} more common; 50 % if rarity had no effect)" if pull["value"] is not None else "")
        + f": {_verdict(pull, 0.5)}.",
        f"Of the answers that are not names, {endings['commoner']} end like a more common name and "
        f"{endings['rarer']} like a rarer one: {_verdict(endings, 0.5)}.",
    ]
    # Then which part of the model is responsible, if that was measured.
    if "decoder alone" in results:
        alone = results["decoder alone"]["look-alikes"]
        text.append(
            f"The decoder alone, given the letters as text, gets {_percent(alone['error'])} of the look-alikes wrong "
            f"(rarity gap {_points(alone['rarity_gap'])}; {alone['pull']['commoner']} mistaken for a more common name, "
            f"{alone['pull']['rarer']} for a rarer one)."
        )
        text += _describe_letters(results["tokens say the true letter"])
    return " ".join(text)


def _describe_letters(agreement: dict[str, Any]) -> list[str]:
    """Returns as text how often the visual tokens agree with the true letter, for right and for pulled answers.

    Kinds without answers are omitted.
    """
    kinds = {"right": "right answers", "pulled": "answers pulled to a more common name"}
    shares = [
        f"in {100 * agreement[kind]['share']:.0f} % (of {agreement[kind]['answers']}) of {title}"
        for kind, title in kinds.items()
        if agreement[kind]["answers"]
    ]
    if not shares:
        return []
    overruled = ": in the latter, the decoder overruled the visual tokens" if agreement["pulled"]["answers"] else ""
    return [
        "At the one letter that distinguishes look-alikes, the visual tokens are nearest to the true letter "
        f"{' and '.join(shares)}{overruled}."
    ]


def _percent(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "none"
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _points(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "an unknown number of points"
    return f"{100 * estimate['value']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}] points"


def _verdict(estimate: dict[str, Any], null: float) -> str:
    """Returns a conclusion in words. `null` is the value that is expected if rarity has no effect."""
    if estimate["value"] is None:
        return "too few answers to tell"
    # Only an interval that excludes `null` supports a conclusion.
    if estimate["low"] > null:
        return "rarity hurts"
    return "being common hurts" if estimate["high"] < null else "no effect of rarity is distinguishable from chance"
