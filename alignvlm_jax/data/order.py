"""The endless order of examples of a stage, a pure function of the seed.

Each position of the order is a record of one part of the mixture, or a group of records that show the same images
(`groups.py`). A part goes through its records in a new random order every epoch. Parts are interleaved by weight:
exactly over every `_BLOCK` positions, at random within such a block. (The rows of a batch take examples at a fixed
stride, which would interfere with a regular pattern.)

    parts "a" (3 records, weight 2) and "b" (5 records, weight 1)
    position    0    1    2    3    4    5    6    7    8
    part        a    b    a    a    a    b    a    b    a
    record      2    0    1    0    1    4    2    3    0       two epochs of "a", none of "b" finished yet

Access is random: every position is computed directly, without stored state and without drawing the positions before it.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np

_BLOCK = 1024
# Permutations up to this size are stored as arrays. `index_shuffle` computes single entries of larger ones; it is slow
# for small ones.
_MAX_STORED_SIZE = 2**16
_ROUNDS = 4  # rounds of the cipher behind `index_shuffle`; grain's own default


@dataclasses.dataclass(frozen=True)
class ExampleOrder:
    """The order of a stage's examples.

    Attributes:
      lengths: number of records of each part, or of its groups.
      weights: share of each part in the positions, relative to the others. Floats and fractions are exact.
      seed: seed of all random choices; use a different one for every stage.
    """

    lengths: tuple[int, ...]
    weights: tuple[float | Fraction, ...]
    seed: int

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns a part and the index in it of the record, or group, at this position."""
        part, count = self._part(position)
        epoch, place = divmod(count, self.lengths[part])
        return part, _shuffled(place, self.lengths[part], (self.seed, part, epoch))

    def _part(self, position: int) -> tuple[int, int]:
        """Returns the part of a position and the number of earlier positions of the same part."""
        if len(self.lengths) == 1:
            return 0, position
        block, place = divmod(position, _BLOCK)
        # Shuffle within the block, then deal out the shuffled positions evenly by weight.
        count = block * _BLOCK + _shuffled(place, _BLOCK, (self.seed, len(self.lengths), block))
        # Split the first part from all others, then the second part from the rest, and so on. Of the first c
        # positions, c * weight // rest belong to the part. Integer arithmetic keeps this exact at any position.
        rest = sum(self._integer_weights)
        for part, weight in enumerate(self._integer_weights):
            before, after = count * weight // rest, (count + 1) * weight // rest
            if after > before:
                return part, before
            count, rest = count - before, rest - weight
        raise AssertionError("the last part must take every remaining position")

    @functools.cached_property
    def _integer_weights(self) -> tuple[int, ...]:
        """The weights scaled to integers; exact, because every float is a fraction."""
        weights = [Fraction(weight) for weight in self.weights]
        unit = math.lcm(*(weight.denominator for weight in weights))
        return tuple(int(weight * unit) for weight in weights)


def _shuffled(place: int, size: int, seed: tuple[int, ...]) -> int:
    """Returns the image of `place` under a random permutation of 0 ... size - 1."""
    if size <= _MAX_STORED_SIZE:
        return int(_permutation(size, _hash(seed))[place])
    import grain  # slow to import, and not needed to answer questions

    return grain.experimental.index_shuffle(place, max_index=size - 1, seed=_hash(seed), rounds=_ROUNDS)


@functools.lru_cache(maxsize=64)
def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size).astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _hash(seed: tuple[int, ...]) -> int:
    """Returns a 32-bit hash of a seed; neighboring seeds used directly would give related orders."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
