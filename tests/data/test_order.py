"""The order of examples: every record once per epoch, parts by weight, the same in every process."""

import collections

import pytest

from alignvlm_jax.data.order import ExampleOrder


@pytest.mark.parametrize("size", [1, 7, 1000, 70_000])  # the last one is computed entry by entry, not stored
def test_an_epoch_holds_every_record_once_in_a_new_order(size):
    order = ExampleOrder((size,), (1.0,), seed=5)
    epochs = [[order[i] for i in range(epoch * size, (epoch + 1) * size)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(size)]
    if size > 1:
        assert epochs[0] != epochs[1] != sorted(epochs[1])
        assert [ExampleOrder((size,), (1.0,), seed=6)[i] for i in range(size)] != epochs[0]


def test_positions_can_be_read_in_any_order():
    one, two = (ExampleOrder((30, 11, 5), (3.0, 1.0, 0.5), seed=7) for _ in range(2))
    forward = [one[i] for i in range(3000)]
    assert [two[i] for i in reversed(range(3000))] == forward[::-1]


def test_parts_are_mixed_by_weight():
    order = ExampleOrder((30, 11, 50), (3.0, 1.0, 0.125), seed=0)
    drawn = [order[i] for i in range(33 * 1024)]
    assert collections.Counter(part for part, _ in drawn) == {0: 24 * 1024, 1: 8 * 1024, 2: 1024}
    for part, length in enumerate(order.lengths):
        records = collections.Counter(record for found, record in drawn if found == part)
        assert set(records) == set(range(length)) and max(records.values()) - min(records.values()) <= 1


def test_every_row_of_a_batch_sees_both_parts():
    """If two parts of equal weight took turns, a row of an even number of rows would always get the same part."""
    order = ExampleOrder((100, 100), (1.0, 1.0), seed=1)
    for row in range(8):
        shares = collections.Counter(order[i][0] for i in range(row, 4096, 8))
        assert 200 < shares[0] < 312


def test_parts_of_equal_length_have_different_orders():
    order = ExampleOrder((40, 40), (1.0, 1.0), seed=3)
    drawn = [order[i] for i in range(1024)]
    first, second = ([record for part, record in drawn if part == wanted][:40] for wanted in (0, 1))
    assert first != second
