"""Which record comes when: one endless order of examples, a pure function of the seed.

Position i of the order is a record of one of the mixture's parts. Each part runs through its records in a new random
order every epoch. Which part it is goes by the weights: exactly so over every `_BLOCK` positions, at random within them
(the rows of a batch take their examples at a stride, against which a regular pattern would beat).

    parts "a" (3 records, weight 2) and "b" (5 records, weight 1)
    position    0    1    2    3    4    5    6    7    8
    part        a    b    a    a    a    b    a    b    a
    record      2    0    1    0    1    4    2    3    0       two epochs of "a", none of "b" finished yet

Any position can be asked for at any time, by anyone: nothing is stored and nothing is drawn one after the other.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import grain
import numpy as np

_BLOCK = 1024
# A permutation of so many is written out; `index_shuffle` computes entries of larger ones, and is slow for small ones.
_WRITTEN_OUT = 2**16
_ROUNDS = 4  # of the cipher behind `index_shuffle`; what grain itself takes


@dataclasses.dataclass(frozen=True)
class ExampleOrder:
    """The order of a stage's examples.

    lengths, weights: of every part, how many records it has and its share relative to the others.
    seed: everything random follows from it; give every stage its own.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The part that the example at this position is of, and the number of its record there."""
        part, count = self._part(position)
        epoch, place = divmod(count, self.lengths[part])
        return part, _shuffled(place, self.lengths[part], (self.seed, part, epoch))

    def _part(self, position: int) -> tuple[int, int]:
        """The part of a position, and how many positions before it are of the same part."""
        if len(self.lengths) == 1:
            return 0, position
        block, place = divmod(position, _BLOCK)
        count = block * _BLOCK + _shuffled(place, _BLOCK, (self.seed, len(self.lengths), block))
        # The first part against all others, then the second against those that are left, and so on.
        rest = sum(self._whole_weights)
        for part, weight in enumerate(self._whole_weights):
            before, after = count * weight // rest, (count + 1) * weight // rest
            if after > before:
                return part, before
            count, rest = count - before, rest - weight
        raise AssertionError("the last part takes all that is left")

    @functools.cached_property
    def _whole_weights(self) -> tuple[int, ...]:
        """The weights in exact whole numbers: a float is a fraction."""
        weights = [Fraction(weight) for weight in self.weights]
        unit = math.lcm(*(weight.denominator for weight in weights))
        return tuple(int(weight * unit) for weight in weights)


def _shuffled(place: int, size: int, seed: tuple[int, ...]) -> int:
    """Where `place` goes in a random permutation of 0 ... size - 1."""
    if size <= _WRITTEN_OUT:
        return int(_permutation(size, _hash(seed))[place])
    return grain.experimental.index_shuffle(place, max_index=size - 1, seed=_hash(seed), rounds=_ROUNDS)


@functools.lru_cache(maxsize=64)
def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size).astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _hash(seed: tuple[int, ...]) -> int:
    """32 bits: neighbouring seeds would otherwise give orders that have something in common."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
