"""Packs bins by computing subset sums over a small window of waiting examples.

Axis letters: n tokens and m tiles of one example, L positions and M tiles of a bin, W waiting examples. An example is
one conversation or one tree of them (`trees.py`).

Each row of the batch has one `Window`. Examples enter it in order and W of them wait at a time. A bin consists of the
example that has waited longest and the other waiting examples that fill the bin best together with it. Consequences:

* Nothing is dropped, and no example waits for more than W bins. (A few more wait where a group of records is split over
  several trees: they enter together.)
* The contents of a bin depend only on the sizes of the preceding examples of this row, not on the number of hosts,
  processes or threads.
* The state is W positions and sizes, a few kilobytes however large the images are.

"Best" is the largest sum of two shares: the share of the bin's tokens and the share of its tiles. All reachable sums
are computed at once. `sums[j]` is an integer whose bit t is set if some subset of the examples has j tiles and t tokens
in total; adding an example of n tokens and m tiles adds `sums[j - m] << n`. Example: L = 10, M = 3, and the oldest
example has n = 4 and m = 1. That leaves 6 tokens and 2 tiles for the others, (4, 1), (3, 1) and (2, 0):

    sums of 0 tiles   0, 2              nothing, (2, 0)
    sums of 1 tile    3, 4, 5, 6        the best: (4, 1) and (2, 0) fill all tokens and leave one tile empty
    sums of 2 tiles                     none: (4, 1) and (3, 1) have 7 tokens

Trees bring a third limit, Tb tokens in the branches of a bin. It rarely matters, so it is checked at the end. If the
best subset exceeds it, the sums are computed again with the smallest number of branch tokens that leads to each. The
best sum whose number is within the limit is then the best that all three limits allow.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignvlm_jax.data.packing import PackingConfig


class MeasuredExample(NamedTuple):
    """The position of an example in the order, and its size.

    Attributes:
      position: position of its group of records in the order.
      tokens: number of its tokens.
      tiles: number of its tiles.
      branch_tokens: number of its tokens in the branches of a tree.
      questions: number of examples that it counts as: the branches of a tree.
      index: its index among the examples that its group is split into.
    """

    position: int
    tokens: int
    tiles: int
    branch_tokens: int = 0
    questions: int = 1
    index: int = 0

    def as_json(self) -> list[int]:
        """Returns the example as a list. An ordinary example has three values, as in checkpoints of all versions."""
        return list(self[:3] if self[3:] == (0, 1, 0) else self)


@dataclasses.dataclass
class Window:
    """The examples of one row that wait for a bin, oldest first.

    Attributes:
      config: shapes of a bin.
      next_position: position in the order of the next example to enter the window.
      waiting: the waiting examples.
    """

    config: PackingConfig
    next_position: int
    waiting: list[MeasuredExample] = dataclasses.field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """Returns whether more examples must enter the window before the next bin is chosen."""
        return len(self.waiting) < self.config.window

    def pop_bin(self) -> list[MeasuredExample]:
        """Removes the examples of the next bin and returns them, oldest first; returns [] if none wait."""
        if not self.waiting:
            return []
        chosen = choose_bin(self.waiting, self.config)
        examples = [self.waiting[i] for i in chosen]
        self.waiting = [example for i, example in enumerate(self.waiting) if i not in chosen]
        return examples

    def state(self) -> dict[str, Any]:
        """Returns the complete state as JSON values; `from_state` is the inverse."""
        return {"next": self.next_position, "waiting": [example.as_json() for example in self.waiting]}

    @classmethod
    def from_state(cls, config: PackingConfig, state: Mapping[str, Any]) -> "Window":
        """Restores a window from the result of `state`."""
        return cls(config, state["next"], [MeasuredExample(*example) for example in state["waiting"]])


def choose_bin(waiting: Sequence[MeasuredExample], config: PackingConfig) -> list[int]:
    """Returns the indices of the examples that share the next bin, in increasing order; index 0 is always included.

    Every example must fit into an empty bin.
    """
    # The oldest example is always chosen. The others fill what it leaves of the bin.
    tokens, tiles = config.tokens_per_bin - waiting[0].tokens, config.tiles_per_bin - waiting[0].tiles
    # Sort by size. Backtracking starts at the end of `others`, so among equal sums it finds the one with the largest
    # examples. Small examples fit nearly anywhere and can wait.
    others = sorted(
        (i for i in range(1, len(waiting)) if waiting[i].tokens <= tokens and waiting[i].tiles <= tiles),
        key=lambda i: (_fill_share(waiting[i].tokens, waiting[i].tiles, config), -i),
    )
    fitting = (1 << tokens + 1) - 1  # mask of the sums that do not exceed the free tokens
    sums = [1] + [0] * tiles  # at first only the empty subset: no tiles, no tokens
    sums_before = []  # for each of `others`, the sums reachable with the examples before it
    for i in others:
        n, m = waiting[i].tokens, waiting[i].tiles
        sums_before.append(sums)
        sums = [bits | (sums[j - m] << n & fitting if j >= m else 0) for j, bits in enumerate(sums)]
    # For each number of tiles, only the largest number of tokens can be best.
    best = ((bits.bit_length() - 1, j) for j, bits in enumerate(sums) if bits)
    n, m = max(best, key=lambda total: _fill_share(*total, config))
    # Walk back from the best sum: an example is part of it if the rest is reachable without this example.
    chosen = []
    for i, before in zip(reversed(others), reversed(sums_before), strict=True):
        rest_n, rest_m = n - waiting[i].tokens, m - waiting[i].tiles
        if rest_n >= 0 and rest_m >= 0 and before[rest_m] >> rest_n & 1:
            chosen.append(i)
            n, m = rest_n, rest_m
    branch_tokens = config.branch_tokens - waiting[0].branch_tokens
    if sum(waiting[i].branch_tokens for i in chosen) > branch_tokens:
        chosen = _choose_by_branches(waiting, others, (tokens, tiles, branch_tokens), config)
    # If there are more than `examples_per_bin`, keep the largest: backtracking added those first.
    kept, questions = [0], waiting[0].questions
    for i in chosen:
        if questions + waiting[i].questions <= config.examples_per_bin:
            kept.append(i)
            questions += waiting[i].questions
    return sorted(kept)


def _choose_by_branches(
    waiting: Sequence[MeasuredExample], others: Sequence[int], free: tuple[int, int, int], config: PackingConfig
) -> list[int]:
    """Returns the best subset of `others` within the free tokens, tiles and branch tokens, largest examples first."""
    tokens, tiles, branch_tokens = free
    unreachable = branch_tokens + 1
    # least[j, t] is the smallest number of branch tokens of a subset with j tiles and t tokens.
    least = np.full((tiles + 1, tokens + 1), unreachable, np.int32)
    least[0, 0] = 0
    taken = []  # for each of `others`, the sums [j, t] that it is part of; without the first m tiles and n tokens
    for i in others:
        n, m, b = waiting[i].tokens, waiting[i].tiles, waiting[i].branch_tokens
        with_this, without = least[: tiles + 1 - m, : tokens + 1 - n] + b, least[m:, n:]
        taken.append((with_this <= without) & (with_this < unreachable))
        np.copyto(without, with_this, where=taken[-1])
    reached = least < unreachable
    # For each number of tiles, only the largest number of tokens can be best.
    best = ((int(np.flatnonzero(row)[-1]), j) for j, row in enumerate(reached) if row.any())
    n, m = max(best, key=lambda total: _fill_share(*total, config))
    chosen = []
    for i, is_part in zip(reversed(others), reversed(taken), strict=True):
        rest_n, rest_m = n - waiting[i].tokens, m - waiting[i].tiles
        if rest_n >= 0 and rest_m >= 0 and is_part[rest_m, rest_n]:
            chosen.append(i)
            n, m = rest_n, rest_m
    return chosen


def _fill_share(tokens: int, tiles: int, config: PackingConfig) -> float:
    """Returns the share of a bin's tokens plus the share of its tiles."""
    return tokens / config.tokens_per_bin + tiles / max(config.tiles_per_bin, 1)
