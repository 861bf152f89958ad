"""Measures how full rows are with packing, bucketing and padding, on examples with realistic lengths.

Packing fills the bins of configs/alignvlm_1b.py, with windows as in training (`data/window.py`). The lengths are drawn
from `packing_lengths.json`: for each data set, the share of images with each number of tiles, and the share of texts in
each range of tokens.

These distributions are not measured, because the data sets are not available here. They are derived from published
descriptions:

* DocVQA: pages of the UCSF Industry Documents Library, scanned at 150 to 250 dots per inch. The `ovis` rule uses all
  nine tiles and the thumbnail, except for a few small pages. There are 3.9 questions per page, of 8 words, with answers
  of 2 words, mostly one question per record.
* CC-12M: JPEGs of more than 400 pixels in both directions and aspect ratios of at most 2.5 to 1 (the filters of the
  data set), cut by the `ovis` rule. Long sides are about log-normal around 800 pixels. Captions have 20 words on
  average, with a long tail.

Both include the tokens of the Llama 3 chat template.

With trees (`config.data.group_questions`), the questions of a page of DocVQA share its tiles. A page has one question
and a Poisson number of further ones, 3.9 on average; the text of each counts completely as tokens of its branch. A bin
holds at most `branch_tokens_per_bin` of them. Captions are examples of their own.

Padding gives every example a row that fits the longest possible one: the largest number of tiles, and 2,048 text
tokens. Bucketing sorts examples into classes of similar length and pads each row to the longest example of its class.
Each class is a separate shape, so the training step is compiled once per class, and batches are filled per class.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alignvlm_jax.config import load_config
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.window import MeasuredExample, Window
from alignvlm_jax.models.alignvlm import tokens_per_tile

LENGTHS = Path(__file__).parent / "packing_lengths.json"
CONFIG = "configs/alignvlm_1b.py"
BAR_TOKENS, BAR_TILES = 0.95, 0.90  # smallest fill that meets the target
SHARES = (0.5, 0.2, 0.8)  # shares of DocVQA; the target applies to the first one
WINDOWS = (1, 4, 8, 16, 32, 64, 128)
BUCKETS = 4
QUESTIONS_PER_PAGE = 3.9
MORE_TEXT = 256  # tokens that a bin of trees has more, because two pages have eight questions
_BINS_QUICK = 100
_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--bins", type=int, default=1000, help="number of bins to fill (default: 1000)")
    parser.add_argument("--quick", action="store_true", help=f"smoke test: {_BINS_QUICK} bins")


def run(args: argparse.Namespace) -> dict:
    """Fills bins with each method, prints a table, and returns the results."""
    config = load_config(CONFIG)
    packing, per_tile = config.data.packing, tokens_per_tile(config.model)
    bins = _BINS_QUICK if args.quick else args.bins
    longest = config.data.tiling.max_tiles_per_image, max(stage.max_text_tokens for stage in config.stages)
    figures = {"bins": bins, "packing": dataclasses.asdict(packing), "mixtures": {}}
    print(f"{bins} bins of {packing.tokens_per_bin} tokens and {packing.tiles_per_bin} tiles\n")
    # Compare the methods on each mixture.
    for share in SHARES:
        examples = draw_examples(share, per_tile, seed=0)
        methods = {
            f"packing, window {packing.window}": pack(examples, packing, bins),
            f"bucketing, {BUCKETS} shapes": bucket(examples, bins, BUCKETS),
            "padding": pad(examples, bins, longest[0], longest[0] * per_tile + longest[1]),
        }
        print(f"{share:.0%} DocVQA, {1 - share:.0%} CC-12M     tokens    tiles   examples/row")
        for name, fill in methods.items():
            print(f"  {name:<26}{fill['tokens']:>8.1%} {fill['tiles']:>8.1%} {fill['examples_per_bin']:>14.2f}")
        print()
        figures["mixtures"][f"{share:.0%} docvqa"] = methods
    # Trees of all questions of a page. With a tenth of the branch tokens, that limit decides about most bins.
    wide = dataclasses.replace(packing, tokens_per_bin=packing.tokens_per_bin + MORE_TEXT)
    print(f"{f'trees, {wide.tokens_per_bin} tokens a bin':<28}  tokens    tiles   examples/row   us/bin")
    figures["trees"] = {}
    for share, limit in [(SHARES[0], wide.branch_tokens), (SHARES[0], wide.branch_tokens // 10)]:
        trees = draw_examples(share, per_tile, seed=0, branch_tokens=limit)
        shapes = dataclasses.replace(wide, branch_tokens_per_bin=limit)
        fill = pack(trees, shapes, bins)
        name = f"{limit} in branches"
        print(
            f"  {name:<26}{fill['tokens']:>8.1%} {fill['tiles']:>8.1%} {fill['examples_per_bin']:>14.2f} "
            f"{1e6 * fill['seconds_per_bin']:>8.0f}"
        )
        figures["trees"][name] = fill
    print()
    # Vary the size of the window.
    examples = draw_examples(SHARES[0], per_tile, seed=0)
    figures["windows"] = {}
    print(f"{'window':<28}  tokens    tiles   us/bin")
    for window in WINDOWS:
        fill = pack(examples, dataclasses.replace(packing, window=window), bins)
        print(f"  {window:<26}{fill['tokens']:>8.1%} {fill['tiles']:>8.1%} {1e6 * fill['seconds_per_bin']:>8.0f}")
        figures["windows"][str(window)] = fill
    best = next(iter(figures["mixtures"][f"{SHARES[0]:.0%} docvqa"].values()))
    figures["meets_bar"] = all(
        fill["tokens"] >= BAR_TOKENS and fill["tiles"] >= BAR_TILES
        for fill in (best, figures["trees"][f"{wide.branch_tokens} in branches"])
    )
    verdict = "met" if figures["meets_bar"] else "MISSED"
    print(f"\ntarget: {BAR_TOKENS:.0%} of tokens and {BAR_TILES:.0%} of tiles: {verdict}")
    return figures


def draw_examples(
    share: float, per_tile: int, *, seed: int, number: int = 20_000, branch_tokens: int | None = None
) -> list[MeasuredExample]:
    """Draws the sizes of examples of a mixture with the given share of DocVQA.

    Args:
      share: share of DocVQA in the examples, or in the trees.
      per_tile: number of visual tokens per tile.
      seed: seed of all draws.
      number: number of examples.
      branch_tokens: limit of a bin, with which the pages of DocVQA are trees of all their questions; None draws one
        question for each page.
    """
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
    examples = [
        MeasuredExample(i, int(m * per_tile + t), int(m)) for i, (m, t) in enumerate(zip(tiles, text, strict=True))
    ]
    if branch_tokens is None:
        return examples
    others = np.where(is_page, rng.poisson(QUESTIONS_PER_PAGE - 1, number), 0)
    low, high, share_of_range = np.array(lengths["docvqa"]["text_tokens"]).T
    ranges = rng.choice(len(low), others.sum(), p=share_of_range)
    other_texts = np.split(rng.integers(low[ranges], high[ranges]), np.cumsum(others)[:-1])
    return [
        _tree(example, int(t), texts, branch_tokens)
        for example, t, texts in zip(examples, text, other_texts, strict=True)
    ]


def _tree(example: MeasuredExample, text: int, others: np.ndarray, branch_tokens: int) -> MeasuredExample:
    """Returns the tree of an example and further questions; those that exceed the limit are left to another tree."""
    fitting = int(np.sum(text + np.cumsum(others) <= branch_tokens))
    if not fitting:
        return example  # one question has no branches
    more = int(others[:fitting].sum())
    return example._replace(tokens=example.tokens + more, branch_tokens=text + more, questions=1 + fitting)


def pack(examples: list[MeasuredExample], packing: PackingConfig, bins: int) -> dict[str, float]:
    """Packs examples into bins, with one window for each row of the microbatch, as in training."""
    rows = [(Window(packing, row), iter(examples[row::_ROWS])) for row in range(_ROWS)]
    filled, start_time = [], time.perf_counter()
    # The rows take turns, as each microbatch takes one bin from each.
    for window, upcoming in itertools.islice(itertools.cycle(rows), bins):
        window.waiting += itertools.islice(upcoming, packing.window - len(window.waiting))
        filled.append(window.pop_bin())
    seconds = time.perf_counter() - start_time
    shapes = [(packing.tokens_per_bin, packing.tiles_per_bin)] * bins
    return _fill(filled, shapes) | {"seconds_per_bin": seconds / bins}


def pad(examples: list[MeasuredExample], bins: int, tiles: int, tokens: int) -> dict[str, float]:
    """Pads every example to the same size, one example per row."""
    return _fill([[example] for example in examples[:bins]], [(tokens, tiles)] * bins)


def bucket(examples: list[MeasuredExample], bins: int, buckets: int) -> dict[str, float]:
    """Pads every example to the size of the longest one of its class, one example per row."""
    by_length = sorted(examples[:bins], key=lambda example: example.tokens)
    classes = [part for part in _split(by_length, buckets) if part]
    shapes = [(max(e.tokens for e in part), max(e.tiles for e in part)) for part in classes for _ in part]
    return _fill([[example] for part in classes for example in part], shapes)


def _split(examples: list[MeasuredExample], parts: int) -> Iterator[list[MeasuredExample]]:
    """Yields contiguous parts of about equal size."""
    for part in range(parts):
        yield examples[part * len(examples) // parts : (part + 1) * len(examples) // parts]


def _fill(rows: list[list[MeasuredExample]], shapes: list[tuple[int, int]]) -> dict[str, float]:
    """Returns the shares of the rows' tokens and tiles that examples fill, and the number of examples per row."""
    tokens, tiles = np.array(shapes).sum(axis=0)
    return {
        "tokens": sum(example.tokens for row in rows for example in row) / int(tokens),
        "tiles": sum(example.tiles for row in rows for example in row) / int(tiles),
        "examples_per_bin": sum(example.questions for row in rows for example in row) / len(rows),
    }
