"""Bin packing: the best subset, against hand-worked cases and exhaustive search; nothing is dropped or kept waiting."""

import itertools

import numpy as np
import pytest

from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.window import MeasuredExample, Window, choose_bin


def _measured(*sizes):
    return [MeasuredExample(i, *size) for i, size in enumerate(sizes)]


def test_worked_example():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=3)
    assert choose_bin(_measured((4, 1), (4, 1), (3, 1), (2, 0)), config) == [0, 1, 3]


def test_oldest_example_goes_first_and_small_ones_are_kept_for_later():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=4)
    # Example 1 alone would fill the bin, but example 0 has waited longest.
    assert choose_bin(_measured((8, 1), (10, 4), (3, 1)), config) == [0]
    # 6 tokens and 2 tiles are free. Example 1 fills them, and so do 2 and 3 together, which fit more easily later.
    assert choose_bin(_measured((4, 2), (6, 2), (3, 1), (3, 1)), config) == [0, 1]


def test_no_more_examples_than_a_bin_takes():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=0, examples_per_bin=3)
    chosen = choose_bin(_measured((1, 0), (1, 0), (2, 0), (1, 0), (3, 0)), config)
    assert chosen == [0, 2, 4]


@pytest.mark.parametrize("seed", range(40))
def test_as_good_as_the_best_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    config = PackingConfig(tokens_per_bin=int(rng.integers(20, 60)), tiles_per_bin=int(rng.integers(0, 8)))
    sizes = [
        (int(rng.integers(1, config.tokens_per_bin + 1)), int(rng.integers(0, config.tiles_per_bin + 1)))
        for _ in range(rng.integers(1, 10))
    ]
    waiting = _measured(*sizes)

    def total(chosen):
        return sum(sizes[i][0] for i in chosen), sum(sizes[i][1] for i in chosen)

    def share(chosen):
        tokens, tiles = total(chosen)
        return tokens / config.tokens_per_bin + tiles / max(config.tiles_per_bin, 1)

    subsets = [(0, *others) for n in range(len(sizes)) for others in itertools.combinations(range(1, len(sizes)), n)]
    fitting = [c for c in subsets if total(c)[0] <= config.tokens_per_bin and total(c)[1] <= config.tiles_per_bin]
    chosen = choose_bin(waiting, config)
    assert tuple(chosen) in fitting and share(chosen) == pytest.approx(max(map(share, fitting)))


@pytest.mark.parametrize("seed", range(40))
def test_as_good_as_the_best_of_all_subsets_with_a_limit_on_branches(seed):
    rng = np.random.default_rng(seed)
    config = PackingConfig(
        tokens_per_bin=int(rng.integers(20, 60)),
        tiles_per_bin=int(rng.integers(0, 8)),
        branch_tokens_per_bin=int(rng.integers(5, 20)),
    )
    waiting = []
    for i in range(rng.integers(1, 10)):
        tokens = int(rng.integers(1, config.tokens_per_bin + 1))
        branches = int(rng.integers(0, min(tokens, config.branch_tokens) + 1)) * int(rng.integers(0, 2))
        waiting.append(MeasuredExample(i, tokens, int(rng.integers(0, config.tiles_per_bin + 1)), branches))
    limits = np.array([config.tokens_per_bin, config.tiles_per_bin, config.branch_tokens])

    def total(chosen):
        return np.sum([waiting[i][1:4] for i in chosen], axis=0)

    def share(chosen):
        return total(chosen)[0] / limits[0] + total(chosen)[1] / max(limits[1], 1)

    subsets = [
        (0, *others) for n in range(len(waiting)) for others in itertools.combinations(range(1, len(waiting)), n)
    ]
    fitting = [chosen for chosen in subsets if (total(chosen) <= limits).all()]
    chosen = choose_bin(waiting, config)
    assert tuple(chosen) in fitting and share(chosen) == pytest.approx(max(map(share, fitting)))


def test_branches_count_as_examples():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=0, examples_per_bin=4)
    trees = [MeasuredExample(i, 2, 0, 1, questions) for i, questions in enumerate((2, 3, 1, 1, 1))]
    assert choose_bin(trees, config) == [0, 2, 3]


def test_nothing_is_dropped_and_nothing_waits_long():
    rng = np.random.default_rng(0)
    config = PackingConfig(tokens_per_bin=1000, tiles_per_bin=10, window=12)
    sizes = [(int(rng.integers(10, 1001)), int(rng.integers(0, 11))) for _ in range(500)]
    window, next_position, bin_of = Window(config, 0), 0, {}
    for number in itertools.count():
        while window.has_room and next_position < len(sizes):
            window.waiting.append(MeasuredExample(next_position, *sizes[next_position]))
            next_position += 1
        chosen = window.pop_bin()
        if not chosen:
            break
        assert sum(example.tokens for example in chosen) <= 1000 and sum(example.tiles for example in chosen) <= 10
        assert [example.position for example in chosen] == sorted(example.position for example in chosen)
        bin_of |= {example.position: number for example in chosen}
    assert sorted(bin_of) == list(range(500)) and window.pop_bin() == []
    # While an example waits, at least one older example leaves with each bin.
    assert all(bin_of[i] - min(bin_of[j] for j in range(i, min(i + 12, 500))) <= config.window for i in bin_of)


def test_state_is_complete():
    config = PackingConfig(tokens_per_bin=1000, tiles_per_bin=10, window=5)
    window = Window(config, 17, _measured((700, 3), (400, 6), (200, 1), (300, 7)))
    # A tree has more values; an ordinary example has those of earlier versions, which can be restored.
    window.waiting[1] = MeasuredExample(1, 400, 6, 50, 3, 2)
    assert window.state()["waiting"][:2] == [[0, 700, 3], [1, 400, 6, 50, 3, 2]]
    restored = Window.from_state(config, window.state())
    assert restored == window and restored.waiting[2] == MeasuredExample(2, 200, 1)
    assert restored.pop_bin() == window.pop_bin() and restored == window
