"""Which examples share a bin: the best subset, found by hand and by trying all; nothing is dropped or kept waiting."""

import itertools

import numpy as np
import pytest

from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.window import MeasuredExample, Window, choose_bin


def _waiting(*sizes):
    return [MeasuredExample(i, *size) for i, size in enumerate(sizes)]


def test_worked_example():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=3)
    assert choose_bin(_waiting((4, 1), (4, 1), (3, 1), (2, 0)), config) == [0, 1, 3]


def test_the_oldest_goes_first_and_small_ones_are_spared():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=4)
    # 1 alone would fill the bin, but the oldest has waited longest.
    assert choose_bin(_waiting((8, 1), (10, 4), (3, 1)), config) == [0]
    # 6 tokens and 2 tiles are free: 1 alone or 2 and 3 fill them; 2 and 3 find a place more easily later.
    assert choose_bin(_waiting((4, 2), (6, 2), (3, 1), (3, 1)), config) == [0, 1]


def test_no_more_examples_than_a_bin_takes():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=0, examples_per_bin=3)
    chosen = choose_bin(_waiting((1, 0), (1, 0), (2, 0), (1, 0), (3, 0)), config)
    assert chosen == [0, 2, 4]


@pytest.mark.parametrize("seed", range(40))
def test_as_good_as_the_best_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    config = PackingConfig(tokens_per_bin=int(rng.integers(20, 60)), tiles_per_bin=int(rng.integers(0, 8)))
    sizes = [
        (int(rng.integers(1, config.tokens_per_bin + 1)), int(rng.integers(0, config.tiles_per_bin + 1)))
        for _ in range(rng.integers(1, 10))
    ]
    waiting = _waiting(*sizes)

    def total(chosen):
        return sum(sizes[i][0] for i in chosen), sum(sizes[i][1] for i in chosen)

    def share(chosen):
        tokens, tiles = total(chosen)
        return tokens / config.tokens_per_bin + tiles / max(config.tiles_per_bin, 1)

    everything = [(0, *others) for n in range(len(sizes)) for others in itertools.combinations(range(1, len(sizes)), n)]
    fitting = [c for c in everything if total(c)[0] <= config.tokens_per_bin and total(c)[1] <= config.tiles_per_bin]
    chosen = choose_bin(waiting, config)
    assert tuple(chosen) in fitting and share(chosen) == pytest.approx(max(map(share, fitting)))


def test_nothing_is_dropped_and_nothing_waits_long():
    rng = np.random.default_rng(0)
    config = PackingConfig(tokens_per_bin=1000, tiles_per_bin=10, window=12)
    sizes = [(int(rng.integers(10, 1001)), int(rng.integers(0, 11))) for _ in range(500)]
    window, came, left = Window(config, 0), 0, {}
    for number in itertools.count():
        while window.has_room and came < len(sizes):
            window.waiting.append(MeasuredExample(came, *sizes[came]))
            came += 1
        taken = window.pop_bin()
        if not taken:
            break
        assert sum(example.tokens for example in taken) <= 1000 and sum(example.tiles for example in taken) <= 10
        assert [example.position for example in taken] == sorted(example.position for example in taken)
        left |= {example.position: number for example in taken}
    assert sorted(left) == list(range(500)) and window.pop_bin() == []
    # While it waits, at least one older example leaves with each bin.
    assert all(left[i] - min(left[j] for j in range(i, min(i + 12, 500))) <= config.window for i in left)


def test_a_state_is_all_there_is():
    config = PackingConfig(tokens_per_bin=1000, tiles_per_bin=10, window=5)
    window = Window(config, 17, _waiting((700, 3), (400, 6), (200, 1), (300, 7)))
    again = Window.from_state(config, window.state())
    assert again == window and again.waiting[2] == MeasuredExample(2, 200, 1)
    assert again.pop_bin() == window.pop_bin() and again == window
