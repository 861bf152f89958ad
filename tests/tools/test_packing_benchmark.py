"""Tests of `benchmark.py packing`: a thousand bins reach the target share of real content."""

import argparse
import json

import pytest

from tools.benchmarks import packing


@pytest.fixture(scope="module")
def figures():
    return packing.run(argparse.Namespace(bins=1000, quick=False))


def test_bins_are_full(figures):
    assert figures["bins"] == 1000 and figures["meets_bar"]
    for methods in figures["mixtures"].values():
        packed, bucketed, padded = methods.values()
        assert packed["tokens"] >= 0.95 and packed["tiles"] >= 0.90
        assert packed["tokens"] > bucketed["tokens"] > padded["tokens"]


def test_a_larger_window_fills_bins_better(figures):
    windows = figures["windows"]
    default = str(figures["packing"]["window"])
    assert windows["1"]["tokens"] < 0.6 < windows["4"]["tokens"] < windows[default]["tokens"]
    assert windows["128"]["tokens"] - windows[default]["tokens"] < 0.01, "a larger window would gain little"


def test_lengths_are_shares():
    for lengths in json.loads(packing.LENGTHS.read_text()).values():
        assert sum(lengths["tiles"].values()) == pytest.approx(1)
        ranges = lengths["text_tokens"]
        assert sum(share for _, _, share in ranges) == pytest.approx(1)
        assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))
