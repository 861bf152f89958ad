"""How full bins are: packing beside padding (one example a row) and bucketing, on lengths like those of training.

The bins are those of configs/alignvlm_1b.py, the windows those of training (`data/window.py`), the lengths drawn from
`packing_lengths.json`: for each data set, how many of the pictures make how many tiles, and text tokens by ranges.

Where its shape comes from. The data sets are not at hand: it was not counted, but follows from what is published of
them. DocVQA: pages of the UCSF Industry Documents Library, scanned at 150 to 250 dots per inch, for which the `ovis`
rule takes all its nine tiles and the thumbnail but for a few small ones; 3.9 questions a page of 8 words and answers of
2, mostly one question a record. CC-12M: JPEGs of more than 400 pixels both ways and sides of at most 2.5 to 1 (the data
set's filters), long sides about log-normal around 800 pixels, cut by the `ovis` rule; captions of 20 words on average
with a long tail. To both, what the Llama 3 chat template adds.

Padding gives every example a row that fits the longest there may be: the most tiles of an image and 2,048 of text.
Bucketing sorts examples into classes of near length and pads a row to the longest of its class; each class is a shape
of its own, for which the training step is compiled and batches of which it needs to fill.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alignvlm_jax.config.loading import load_config
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.window import MeasuredExample, Window
from alignvlm_jax.models.alignvlm import tokens_per_tile

LENGTHS = Path(__file__).parent / "packing_lengths.json"
CONFIG = "configs/alignvlm_1b.py"
BAR_TOKENS, BAR_TILES = 0.95, 0.90
SHARES = (0.5, 0.2, 0.8)  # of DocVQA; the first is what the bar is for
WINDOWS = (1, 4, 8, 16, 32, 64, 128)
BUCKETS = 4
_BINS_QUICK = 100
_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bins", type=int, default=1000, help="how many to fill (default: 1000)")
    parser.add_argument("--quick", action="store_true", help=f"{_BINS_QUICK} bins: does everything run")


def run(args: argparse.Namespace) -> dict:
    """Fills bins in every way, prints a table."""
    config = load_config(CONFIG)
    packing, per_tile = config.data.packing, tokens_per_tile(config.model)
    bins = _BINS_QUICK if args.quick else args.bins
    longest = config.data.tiling.max_tiles_per_image, max(stage.max_text_tokens for stage in config.stages)
    figures = {"bins": bins, "packing": dataclasses.asdict(packing), "mixtures": {}}
    print(f"bins of {packing.tokens_per_bin} tokens and {packing.tiles_per_bin} tiles, {bins} of them\n")
    for share in SHARES:
        examples = draw_examples(share, per_tile, seed=0)
        ways = {
            f"packing, window {packing.window}": pack(examples, packing, bins),
            f"bucketing, {BUCKETS} shapes": bucket(examples, bins, BUCKETS),
            "padding": pad(examples, bins, longest[0], longest[0] * per_tile + longest[1]),
        }
        print(f"{share:.0%} DocVQA, {1 - share:.0%} CC-12M     tokens    tiles   examples a row")
        for name, way in ways.items():
            print(f"  {name:<26}{way['tokens']:>8.1%} {way['tiles']:>8.1%} {way['examples_per_bin']:>16.2f}")
        print()
        figures["mixtures"][f"{share:.0%} docvqa"] = ways
    examples = draw_examples(SHARES[0], per_tile, seed=0)
    figures["windows"] = {}
    print(f"{'window':<28}  tokens    tiles   us a bin")
    for window in WINDOWS:
        way = pack(examples, dataclasses.replace(packing, window=window), bins)
        print(f"  {window:<26}{way['tokens']:>8.1%} {way['tiles']:>8.1%} {1e6 * way['seconds_per_bin']:>10.0f}")
        figures["windows"][str(window)] = way
    best = next(iter(figures["mixtures"][f"{SHARES[0]:.0%} docvqa"].values()))
    figures["meets_bar"] = best["tokens"] >= BAR_TOKENS and best["tiles"] >= BAR_TILES
    verdict = "met" if figures["meets_bar"] else "MISSED"
    print(f"\nbar: {BAR_TOKENS:.0%} of tokens and {BAR_TILES:.0%} of tiles: {verdict}")
    return figures


def draw_examples(share: float, per_tile: int, *, seed: int, number: int = 20_000) -> list[MeasuredExample]:
    """Sizes of examples of a mixture of which `share` is DocVQA."""
    rng = np.random.default_rng(seed)
    lengths = json.loads(LENGTHS.read_text())
    is_page = rng.random(number) < share
    tiles, text = np.zeros(number, int), np.zeros(number, int)
    for name, chosen in (("docvqa", is_page), ("cc12m", ~is_page)):
        counts, weights = zip(*lengths[name]["tiles"].items(), strict=True)
        low, high, share_of_range = np.array(lengths[name]["text_tokens"]).T
        ranges = rng.choice(len(low), chosen.sum(), p=share_of_range)
        tiles[chosen] = rng.choice(np.array(counts, int), chosen.sum(), p=weights)
        text[chosen] = rng.integers(low[ranges], high[ranges])
    return [MeasuredExample(i, int(m * per_tile + t), int(m)) for i, (m, t) in enumerate(zip(tiles, text, strict=True))]


def pack(examples: list[MeasuredExample], packing: PackingConfig, bins: int) -> dict[str, float]:
    """Rows with a window each, as in training."""
    rows = [(Window(packing, row), iter(examples[row::_ROWS])) for row in range(_ROWS)]
    filled, started = [], time.perf_counter()
    for window, coming in itertools.islice(itertools.cycle(rows), bins):
        window.waiting += itertools.islice(coming, packing.window - len(window.waiting))
        filled.append(window.pop_bin())
    seconds = time.perf_counter() - started
    shape = [(packing.tokens_per_bin, packing.tiles_per_bin)] * bins
    return _fill(filled, shape) | {"seconds_per_bin": seconds / bins}


def pad(examples: list[MeasuredExample], bins: int, tiles: int, tokens: int) -> dict[str, float]:
    """One example a row, all rows of one size."""
    return _fill([[example] for example in examples[:bins]], [(tokens, tiles)] * bins)


def bucket(examples: list[MeasuredExample], bins: int, buckets: int) -> dict[str, float]:
    """One example a row, rows of a few sizes: of each class of lengths, all have that of its longest."""
    by_length = sorted(examples[:bins], key=lambda example: example.tokens)
    classes = [part for part in _split(by_length, buckets) if part]
    shapes = [(max(e.tokens for e in part), max(e.tiles for e in part)) for part in classes for _ in part]
    return _fill([[example] for part in classes for example in part], shapes)


def _split(examples: list[MeasuredExample], parts: int) -> Iterator[list[MeasuredExample]]:
    for part in range(parts):
        yield examples[part * len(examples) // parts : (part + 1) * len(examples) // parts]


def _fill(rows: list[list[MeasuredExample]], shapes: list[tuple[int, int]]) -> dict[str, float]:
    tokens, tiles = np.array(shapes).sum(axis=0)
    return {
        "tokens": sum(example.tokens for row in rows for example in row) / int(tokens),
        "tiles": sum(example.tiles for row in rows for example in row) / int(tiles),
        "examples_per_bin": sum(map(len, rows)) / len(rows),
    }
