"""Which examples share a bin: subset sums over a small window of examples that wait.

Axis letters: n tokens and m tiles of one example, L positions and M tiles of a bin, W examples that wait.

A row of the batch is fed by one `Window`. Examples come into it in their order, W of them wait at a time, and a bin is
made of the one that waited longest and of those others that together fill it best. So

* nothing is dropped, and nothing waits for more than W bins;
* what is in a bin depends on the sizes of the examples before it in this row's order, and on nothing else: not on how
  many hosts, processes or threads there are;
* the state is W numbers and sizes, a few kilobytes, however large the pictures are.

"Best" is the largest sum of the two shares, of the bin's tokens and of its tiles. All sums that can be had are found at
once: `sums[j]` is a whole number whose bit t says that some of the examples have j tiles and t tokens together, and one
more example of n tokens and m tiles adds `sums[j - m] << n` to it. Example: L = 10, M = 3; the oldest has (4, 1), that
is n = 4 and m = 1, so 6 tokens and 2 tiles are free for the others, (4, 1), (3, 1) and (2, 0):

    sums of 0 tiles   0, 2              nothing, (2, 0)
    sums of 1 tile    3, 4, 5, 6        the best: (4, 1) and (2, 0) fill all tokens and leave one tile empty
    sums of 2 tiles                     none: (4, 1) and (3, 1) have 7 tokens
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignvlm_jax.data.packing import PackingConfig


class Waiting(NamedTuple):
    """An example by its place in the order, and what it takes of a bin."""

    position: int
    tokens: int
    tiles: int


@dataclasses.dataclass
class Window:
    """The examples of one row that wait for a bin, oldest first.

    next_position: the place in the order of the first example that did not come yet.
    """

    config: PackingConfig
    next_position: int
    waiting: list[Waiting] = dataclasses.field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """Whether more examples are to be looked at before the next bin is made."""
        return len(self.waiting) < self.config.window

    def take_bin(self) -> list[Waiting]:
        """Takes out the examples of the next bin, oldest first; none if none wait."""
        if not self.waiting:
            return []
        chosen = choose(self.waiting, self.config)
        taken = [self.waiting[i] for i in chosen]
        self.waiting = [example for i, example in enumerate(self.waiting) if i not in chosen]
        return taken

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON can hold it; `from_state` undoes it."""
        return {"next": self.next_position, "waiting": [list(example) for example in self.waiting]}

    @classmethod
    def from_state(cls, config: PackingConfig, state: Mapping[str, Any]) -> "Window":
        """Goes on from where `state` was taken."""
        return cls(config, state["next"], [Waiting(*example) for example in state["waiting"]])


def choose(waiting: Sequence[Waiting], config: PackingConfig) -> list[int]:
    """The indices of the examples that share the next bin, in order: 0, and those that fill the bin best with it.

    Every example must fit an empty bin.
    """
    tokens, tiles = config.tokens_per_bin - waiting[0].tokens, config.tiles_per_bin - waiting[0].tiles
    # Small examples find room nearly anywhere: of equal sums, the one with the largest examples in it is to be taken.
    others = sorted(
        (i for i in range(1, len(waiting)) if waiting[i].tokens <= tokens and waiting[i].tiles <= tiles),
        key=lambda i: (_share(waiting[i].tokens, waiting[i].tiles, config), -i),
    )
    fitting = (1 << tokens + 1) - 1
    sums = [1] + [0] * tiles
    sums_before = []  # for each of the others, what could be had without it and those after it
    for i in others:
        n, m = waiting[i].tokens, waiting[i].tiles
        sums_before.append(sums)
        sums = [found | (sums[j - m] << n & fitting if j >= m else 0) for j, found in enumerate(sums)]
    best = ((found.bit_length() - 1, j) for j, found in enumerate(sums) if found)
    n, m = max(best, key=lambda total: _share(*total, config))
    chosen = [0]
    for i, before in zip(reversed(others), reversed(sums_before), strict=True):
        rest_n, rest_m = n - waiting[i].tokens, m - waiting[i].tiles
        if rest_n >= 0 and rest_m >= 0 and before[rest_m] >> rest_n & 1:
            chosen.append(i)
            n, m = rest_n, rest_m
    # Should there be too many, the largest stay.
    return sorted(chosen[: config.examples_per_bin])


def _share(tokens: int, tiles: int, config: PackingConfig) -> float:
    """How much of a bin this is, of its tokens and of its tiles together."""
    return tokens / config.tokens_per_bin + tiles / max(config.tiles_per_bin, 1)
