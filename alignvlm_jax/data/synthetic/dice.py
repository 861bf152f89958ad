"""Random choices for one document, fast and reproducible.

NumPy's scalar draws cost microseconds each, and a document needs a few hundred of them (a held-out value is redrawn
about eight times). Uniform numbers are therefore drawn in blocks, and every choice is arithmetic on one of them.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 256


class Dice:
    """Random choices from one Philox stream, which is selected by a tuple of integers."""

    def __init__(self, *key: int):
        self.generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        self._pool: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Returns a number from low to high."""
        if not self._pool:
            self._pool = self.generator.random(_BLOCK).tolist()
        return low + (high - low) * self._pool.pop()

    def integer(self, low: int, high: int) -> int:
        """Returns an integer from low to high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of the options, all with equal probability."""
        return options[int(self.uniform() * len(options))]

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self.uniform() < probability

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns the items in random order (Fisher-Yates shuffle)."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = int(self.uniform() * (last + 1))
            items[last], items[other] = items[other], items[last]
        return items
