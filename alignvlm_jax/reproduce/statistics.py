"""Means with intervals that cover two sources of chance: other seeds and other pages.

Axes: S seeds, Q questions, P pages. The questions on a page are not independent, because a model that misreads a page
tends to answer all of them wrong. A page is therefore one draw, with the sum of its questions.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped
from scipy import stats

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
      mean: mean over seeds and questions.
      low: lower end of the 95 % interval.
      high: upper end of the 95 % interval.
      seeds: number of seeds.
      questions: number of questions.
    """

    mean: float
    low: float
    high: float
    seeds: int
    questions: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """Returns the estimate of a difference as text, with signs."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(values: Shaped[np.ndarray, "S Q"], questions: Sequence[int]) -> Estimate:
    """Returns the mean of a score, or of the difference of two scores, with its interval.

    Two margins of Student's t are added in quadrature: one for the variation between seeds (with three seeds, two
    degrees of freedom), and one for the variation between pages. Variation that depends on both is in both margins, so
    the interval is slightly too wide rather than too narrow. With one seed, it covers only the variation between pages.

    Args:
      values: the score of every seed and question.
      questions: the number of questions on each page, in the order of `values`.
    """
    values = np.asarray(values, np.float64)
    num_seeds, num_questions = values.shape
    mean = float(values.mean())
    # All right or all wrong: these pages show no variation, but others may. The exact binomial bound is the share of
    # wrong pages at which all of these pages are right with a probability of 5 %.
    if np.ptp(values) == 0:
        margin = 1 - (1 - _CONFIDENCE) ** (1 / len(questions))
        return Estimate(mean, mean - margin * (mean > 0), mean + margin * (mean < 1), num_seeds, num_questions)
    # The sums over a page's questions, as deviations from the mean; each is a summand of the mean.
    starts = np.concatenate([[0], np.cumsum(questions)[:-1]])
    page_sums = np.add.reduceat(values - mean, starts, axis=1) / values.size  # [S, P]
    margin = math.hypot(_margin(page_sums.sum(1)), _margin(page_sums.sum(0)))
    return Estimate(mean, mean - margin, mean + margin, num_seeds, num_questions)


def _margin(sums: Shaped[np.ndarray, " n"]) -> float:
    """Returns the margin of the total of these sums, each of which is one draw; 0 for a single draw."""
    count = len(sums)
    if count == 1:
        return 0.0
    # The variance of a total of independent draws is the sum of theirs; count / (count - 1) is Bessel's correction.
    return stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1) * math.sqrt(np.sum(sums**2) * count / (count - 1))


def verdict(difference: Estimate) -> str:
    """Returns the verdict on a claim that this difference is above 0."""
    if difference.low > 0:
        return "Confirmed"
    return "Contradicted" if difference.high < 0 else "Undecided"
