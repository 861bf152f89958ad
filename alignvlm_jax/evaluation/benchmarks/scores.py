"""What answers add up to: a score, how sure it is, and the scores of its parts.

Every score here is a sum over units divided by another: a mean is right / asked, F1 is 2 right / (predicted +
expected). Its 95 % interval is Wilson's where it is right out of asked, and else the middle 95 % of 2,000 bootstrap
samples of the units (with a fixed seed). Units are taken as independent, though questions about one page are not: the
true interval is somewhat wider.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from alignvlm_jax.evaluation.report import Tally

_BOOTSTRAP_SAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
      name: what it measures.
      value: from 0 to 1.
      interval: of 95 %; None where it is not defined.
      count: how many units it is of: questions, or what the name says.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    count: int

    def to_json(self) -> dict:
        interval = None if self.interval is None else [round(100 * bound, 2) for bound in self.interval]
        value = None if math.isnan(self.value) else round(100 * self.value, 2)
        return {"score": value, "interval_95": interval, "count": self.count}


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of one benchmark.

    Attributes:
      primary: the one that papers state; None where the answers are judged elsewhere.
      others: further ones, and those of the parts.
      aborted: the questions, by id, at whose answers the official scorer would end with an error, and the error.
    """

    primary: Score | None
    others: tuple[Score, ...] = ()
    aborted: tuple[tuple[str, str], ...] = ()


def mean(name: str, values: Sequence[float]) -> Score:
    """The plain mean of scores from 0 to 1."""
    if not len(values):
        return Score(name, math.nan, None, 0)
    if set(values) <= {0.0, 1.0}:
        tally = Tally(int(sum(values)), len(values))
        return Score(name, tally.exact_match, tally.interval, len(values))
    return ratio(name, values, np.ones(len(values)))


def ratio(name: str, numerators: Sequence[float], denominators: Sequence[float]) -> Score:
    """A sum over units divided by another; 0 where there is nothing to divide by."""
    tops, bottoms = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not len(tops):
        return Score(name, math.nan, None, 0)
    value = tops.sum() / bottoms.sum() if bottoms.sum() else 0.0
    rng = np.random.default_rng(0)
    sampled = np.zeros(_BOOTSTRAP_SAMPLES)
    for i in range(_BOOTSTRAP_SAMPLES):
        drawn = np.bincount(rng.integers(0, len(tops), len(tops)), minlength=len(tops))
        bottom = np.sum(drawn * bottoms)
        sampled[i] = np.sum(drawn * tops) / bottom if bottom else 0.0
    low, high = np.percentile(sampled, [2.5, 97.5])
    return Score(name, float(value), (float(low), float(high)), len(tops))
