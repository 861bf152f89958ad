"""Scores and their confidence intervals.

Every score is a ratio of two sums over units. A mean is right / asked; F1 is 2 right / (predicted + expected). The 95 %
interval of a proportion is Wilson's. The interval of another score is the central 95 % of 2,000 bootstrap samples of
the units, drawn with a fixed seed. Both intervals treat units as independent. Questions about the same page are not, so
the true interval is somewhat wider.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from alignvlm_jax.evaluation import metrics
from alignvlm_jax.evaluation.report import Tally

_BOOTSTRAP_SAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Score:
    """One score with its confidence interval.

    Attributes:
      name: name of the measure.
      value: score from 0 to 1.
      interval: 95 % interval; None if it is not defined.
      count: number of units: questions, unless the name says otherwise.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    count: int

    def to_json(self) -> dict:
        """Returns the score in percent, its interval and the number of units."""
        interval = None if self.interval is None else [round(100 * bound, 2) for bound in self.interval]
        value = None if math.isnan(self.value) else round(100 * self.value, 2)
        return {"score": value, "interval_95": interval, "count": self.count}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one benchmark.

    Attributes:
      primary: the score that papers report; None if an external judge scores the answers.
      others: further scores, and the scores of the benchmark's parts.
      aborted: pairs of question id and error, for answers at which the official scorer would fail.
    """

    primary: Score | None
    others: tuple[Score, ...] = ()
    aborted: tuple[tuple[str, str], ...] = ()


def mean(name: str, values: Sequence[float]) -> Score:
    """Returns the mean of values from 0 to 1."""
    if not len(values):
        return Score(name, math.nan, None, 0)
    # For proportions, Wilson's interval also holds near 0 and 1, where bootstrap samples hardly vary.
    if set(values) <= {0.0, 1.0}:
        tally = Tally(int(sum(values)), len(values))
        return Score(name, tally.exact_match, tally.interval, len(values))
    return ratio(name, values, np.ones(len(values)))


def ratio(name: str, numerators: Sequence[float], denominators: Sequence[float]) -> Score:
    """Returns the sum of the numerators over the sum of the denominators, or 0 if the latter is 0."""
    tops, bottoms = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not len(tops):
        return Score(name, math.nan, None, 0)
    value = tops.sum() / bottoms.sum() if bottoms.sum() else 0.0
    # Bootstrap over units: in each sample, a unit's weight is the number of times it was drawn.
    rng = np.random.default_rng(0)
    samples = np.zeros(_BOOTSTRAP_SAMPLES)
    for i in range(_BOOTSTRAP_SAMPLES):
        weights = np.bincount(rng.integers(0, len(tops), len(tops)), minlength=len(tops))
        # The denominator is resampled together with the numerator, because both belong to the same units.
        bottom = np.sum(weights * bottoms)
        samples[i] = np.sum(weights * tops) / bottom if bottom else 0.0
    low, high = np.percentile(samples, [2.5, 97.5])
    return Score(name, float(value), (float(low), float(high)), len(tops))


def f1(name: str, documents: Sequence[tuple[Sequence, Sequence]]) -> Score:
    """Returns the F1 over the values of all documents, with an interval over documents.

    Args:
      name: name of the score.
      documents: predicted and expected values of each document, as for `metrics.due_f1`.
    """
    # F1 = 2 right / (predicted + expected), so micro F1 is a ratio of sums over documents.
    bottoms = [len(predicted) + len(expected) for predicted, expected in documents]
    tops = [
        metrics.due_f1([predicted], [expected]) * bottom
        for (predicted, expected), bottom in zip(documents, bottoms, strict=True)
    ]
    return ratio(name, tops, bottoms)
