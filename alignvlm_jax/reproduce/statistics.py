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

    The variance is that of two-way clustered errors (Cameron, Gelbach and Miller 2011): what differs from seed to seed,
    plus what differs from page to page, less what was counted twice. Degrees of freedom by Welch and Satterthwaite: two
    for three seeds where the seeds are all that matters, many where the pages are. With one seed the interval is about
    pages alone.

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
    seeds, pages = _variance(by_page.sum(1)), _variance(by_page.sum(0))
    variance = max(seeds + pages - float(np.sum(by_page**2)), seeds, pages)
    spread = seeds**2 / max(num_seeds - 1, 1) + pages**2 / max(len(questions) - 1, 1)
    margin = stats.t.ppf((1 + _CONFIDENCE) / 2, (seeds + pages) ** 2 / spread) * math.sqrt(variance)
    return Estimate(mean, mean - margin, mean + margin, num_seeds, num_questions)


def _variance(sums: Shaped[np.ndarray, " n"]) -> float:
    """Of the total of these sums, each of which stands for a draw; nothing can be said of a single one."""
    return float(np.sum(sums**2) * len(sums) / (len(sums) - 1)) if len(sums) > 1 else 0.0


def verdict(difference: Estimate) -> str:
    """What a difference that the paper says is above 0 says here."""
    if difference.low > 0:
        return "Shows"
    return "The opposite shows" if difference.high < 0 else "Undecided"
