"""Packs bins by computing subset sums over a small window of waiting examples.

Axis letters: n tokens and m tiles of one example, L positions and M tiles of a bin, W waiting examples.

Each row of the batch has one `Window`. Examples enter it in order and W of them wait at a time. A bin consists of the
example that has waited longest and the other waiting examples that fill the bin best together with it. Consequences:

* Nothing is dropped, and no example waits for more than W bins.
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
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignvlm_jax.data.packing import PackingConfig


class MeasuredExample(NamedTuple):
    """The position of an example in the order, and its size."""

    position: int
    tokens: int
    tiles: int


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
        return {"next": self.next_position, "waiting": [list(example) for example in self.waiting]}

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
    chosen = [0]
    for i, before in zip(reversed(others), reversed(sums_before), strict=True):
        rest_n, rest_m = n - waiting[i].tokens, m - waiting[i].tiles
        if rest_n >= 0 and rest_m >= 0 and before[rest_m] >> rest_n & 1:
            chosen.append(i)
            n, m = rest_n, rest_m
    # If there are more than `examples_per_bin`, keep the largest: backtracking added those first.
    return sorted(chosen[: config.examples_per_bin])


def _fill_share(tokens: int, tiles: int, config: PackingConfig) -> float:
    """Returns the share of a bin's tokens plus the share of its tiles."""
    return tokens / config.tokens_per_bin + tiles / max(config.tiles_per_bin, 1)
