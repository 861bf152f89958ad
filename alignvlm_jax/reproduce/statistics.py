"""Means with intervals that count two chances at once: another seed, and other pages.

Axes: S seeds, Q questions, P pages (a page's questions go together: who misreads a page misreads all of it).
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
    """Attributes:
    mean: over seeds and questions.
    low, high: of the 95 % interval.
    seeds, questions: how many it is made of.
    """

    mean: float
    low: float
    high: float
    seeds: int
    questions: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """For differences."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(values: Shaped[np.ndarray, "S Q"], questions: Sequence[int]) -> Estimate:
    """The mean of a score, or of the difference of two, with its interval.

    Two of Student's margins, one for what differs from seed to seed (three seeds: two degrees of freedom) and one for
    what differs from page to page, added in squares. What differs between seeds and pages at once is in both, so the
    interval is a little too wide rather than too narrow. With one seed it is about pages alone.

    Args:
      values: of every seed and question.
      questions: how many questions each page has, in the order of `values`.
    """
    values = np.asarray(values, np.float64)
    num_seeds, num_questions = values.shape
    mean = float(values.mean())
    if np.ptp(values) == 0:  # all right or all wrong: the pages show no spread, which does not mean that there is none
        margin = 1 - (1 - _CONFIDENCE) ** (1 / len(questions))
        return Estimate(mean, mean - margin * (mean > 0), mean + margin * (mean < 1), num_seeds, num_questions)
    starts = np.concatenate([[0], np.cumsum(questions)[:-1]])
    by_page = np.add.reduceat(values - mean, starts, axis=1) / values.size  # [S, P]
    margin = math.hypot(_margin(by_page.sum(1)), _margin(by_page.sum(0)))
    return Estimate(mean, mean - margin, mean + margin, num_seeds, num_questions)


def _margin(sums: Shaped[np.ndarray, " n"]) -> float:
    """Of the total of these sums, each of which stands for a draw; nothing can be said of a single one."""
    count = len(sums)
    if count == 1:
        return 0.0
    return stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1) * math.sqrt(np.sum(sums**2) * count / (count - 1))


def verdict(difference: Estimate) -> str:
    """What a difference that the paper says is above 0 says here."""
    if difference.low > 0:
        return "Shows"
    return "The opposite shows" if difference.high < 0 else "Undecided"
