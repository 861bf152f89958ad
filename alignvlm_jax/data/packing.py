"""Pack examples into rows of static shape: first-fit on two budgets, text positions and tiles.

Axis letters: K microbatches, B bins (rows), L positions per bin, M tiles per bin, S tile side, N visual tokens per tile
(after the connector), X examples per bin, n tokens and m tiles of one example.

A bin is one row: whole examples behind each other, never a part of one. Two examples, N = 2, as the tokenizer left them
(i: image placeholder, letters: text; weights belong to targets, see `chat.py`):

    example 4, two tiles  tokens         b  u  i  i  i  i  s  y  e
                          visual_index   -  -  0  1  2  3  -  -  -
                          loss_weights   0  0  0  0  0  0  1  1  0        y e is the answer
    example 7, one tile   tokens         b  u  i  i  q  s  x  e
                          visual_index   -  -  0  1  -  -  -  -
                          loss_weights   0  0  0  0  0  1  1  0

and in a bin of L = 20, M = 4, where p is padding:

    tokens          b  u  i  i  i  i  s  y  e  b  u  i  i  q  s  x  e  p  p  p
    targets         u  i  i  i  i  s  y  e  p  u  i  i  q  s  x  e  p  p  p  p
    loss_weights    0  0  0  0  0  0  1  1  0  0  0  0  0  0  1  1  0  0  0  0
    segment_ids     1  1  1  1  1  1  1  1  1  2  2  2  2  2  2  2  2  0  0  0
    positions       0  1  2  3  4  5  6  7  8  0  1  2  3  4  5  6  7  0  0  0
    visual_index    -  -  0  1  2  3  -  -  -  -  -  4  5  -  -  -  -  -  -  -
    tiles           [4's first, 4's second, 7's, empty]       tile m's visual tokens are m * N ... m * N + N - 1
    example_ids     4  7 -1 -1 ...

The last target of an example would be the first token of the next: it has no target, and weight 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from alignvlm_jax.data.chat import EncodedChat
from alignvlm_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The static shapes of a batch.

    tokens_per_bin: L, text and visual tokens together.
    tiles_per_bin: M.
    bins_per_microbatch: B; a multiple of the devices a batch is spread over.
    examples_per_bin: X, the most examples in a bin.
    min_microbatches: K is as large as the examples of a step need, and at least this. Every other K compiles the
      training step anew: set it so that nearly every step has this many.
    """

    tokens_per_bin: int = 8192
    tiles_per_bin: int = 10
    bins_per_microbatch: int = 8
    examples_per_bin: int = 32
    min_microbatches: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < (0 if field.name == "tiles_per_bin" else 1):
                raise ValueError(f"PackingConfig.{field.name}: too small: {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation with its tiles, ready to be packed.

    number: identifies it in `example_ids`.
    was_cut: turns at its end were left out to keep within the limit on text.
    """

    number: int
    tokens: Int32[np.ndarray, " n"]
    loss_weights: Float32[np.ndarray, " n"]
    visual_index: Int32[np.ndarray, " n"]
    tiles: UInt8[np.ndarray, "m S S 3"]
    valid_hw: Int32[np.ndarray, "m 2"]
    was_cut: bool = False


@dataclasses.dataclass(frozen=True)
class Refused:
    """Stands in for an example that cannot be used: unreadable, or too large for any bin."""

    number: int
    reason: str


def make_example(
    number: int,
    chat: EncodedChat,
    tiles: UInt8[np.ndarray, "m S S 3"],
    valid_hw: Int32[np.ndarray, "m 2"],
    config: PackingConfig,
    *,
    tokens_per_tile: int,
    max_text_tokens: int,
) -> Example:
    """Bring an example within the limits, or raise a `UserError` that says which one it breaks.

    Text beyond `max_text_tokens` (visual tokens not counted) is cut at the end of the last answer that fits. Images are
    kept or left out whole, and nothing else is ever cut.
    """
    full_length = len(chat.tokens)
    chat = _cut_text(chat, max_text_tokens)
    num_visual = int(np.sum(chat.visual_index >= 0))
    num_tiles = num_visual // tokens_per_tile
    if num_tiles * tokens_per_tile != num_visual or num_tiles > len(tiles):
        raise ValueError(f"{num_visual} visual tokens are not {tokens_per_tile} for each of at most {len(tiles)} tiles")
    if len(chat.tokens) > config.tokens_per_bin:
        raise UserError(f"{len(chat.tokens)} tokens ({num_visual} visual), a bin holds {config.tokens_per_bin}")
    if num_tiles > config.tiles_per_bin:
        raise UserError(f"{num_tiles} tiles, a bin holds {config.tiles_per_bin}")
    was_cut = len(chat.tokens) < full_length
    return Example(number, *chat, tiles[:num_tiles], valid_hw[:num_tiles], was_cut)


def assign_bins(lengths: Sequence[int], tiles: Sequence[int], config: PackingConfig) -> list[list[int]]:
    """First-fit: every example, largest first, goes to the first bin with room for its tokens and its tiles.

    "Largest" is by the larger of its two shares of a bin. Every example must fit an empty bin. Returns the bins as
    lists of indices into `lengths`.
    """
    lengths, tiles = np.asarray(lengths, np.int64), np.asarray(tiles, np.int64)
    share = np.maximum(lengths / config.tokens_per_bin, tiles / max(config.tiles_per_bin, 1))
    bins: list[list[int]] = []
    # What is left in each bin; there are never more bins than examples.
    room = np.tile([config.tokens_per_bin, config.tiles_per_bin, config.examples_per_bin], (len(lengths), 1))
    for i in np.argsort(-share, kind="stable"):
        need = (lengths[i], tiles[i], 1)
        chosen = int(np.argmax((room >= need).all(axis=1)))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(int(i))
        room[chosen] -= need
    return bins


def pack(
    examples: Sequence[Example | Refused],
    config: PackingConfig,
    *,
    tokens_per_tile: int,
    tile_size: int,
    pad_id: int,
) -> Batch:
    """The packed global batch of one step; every field begins with [K, B].

    Beside the fields of the contract it has counters for the training log: `num_examples` and `num_cut` of each bin,
    and `num_refused` of the step (on its first bin, so that it has the shape of the others: take the sum).
    """
    usable = [example for example in examples if isinstance(example, Example)]
    bins = assign_bins([len(e.tokens) for e in usable], [len(e.tiles) for e in usable], config)
    microbatches = max(config.min_microbatches, -(-len(bins) // config.bins_per_microbatch))
    batch = _empty(microbatches * config.bins_per_microbatch, config, tile_size, pad_id)
    for row, members in enumerate(bins):
        start = tile = 0
        for slot, example in enumerate(usable[i] for i in members):
            n, m = len(example.tokens), len(example.tiles)
            here, here_tiles = slice(start, start + n), slice(tile, tile + m)
            batch["tokens"][row, here] = example.tokens
            batch["targets"][row, start : start + n - 1] = example.tokens[1:]
            batch["loss_weights"][row, here] = example.loss_weights
            batch["segment_ids"][row, here] = slot + 1
            batch["positions"][row, here] = np.arange(n)
            visual = example.visual_index
            batch["visual_index"][row, here] = np.where(visual >= 0, visual + tile * tokens_per_tile, -1)
            batch["tiles"][row, here_tiles] = example.tiles
            batch["tile_valid_hw"][row, here_tiles] = example.valid_hw
            batch["example_ids"][row, slot] = example.number
            batch["num_cut"][row] += example.was_cut
            start, tile = start + n, tile + m
        batch["num_examples"][row] = len(members)
    batch["num_refused"][0] = len(examples) - len(usable)
    lead = (microbatches, config.bins_per_microbatch)
    return {name: field.reshape(lead + field.shape[1:]) for name, field in batch.items()}


def fill(batch: Batch) -> dict[str, float]:
    """How much of a packed batch is real: the fraction of its token slots and of its tile slots."""
    return {
        "tokens": float(np.mean(batch["segment_ids"] > 0)),
        "tiles": float(np.mean(batch["tile_valid_hw"][..., 0] > 0)) if batch["tile_valid_hw"].size else 1.0,
    }


def _empty(rows: int, config: PackingConfig, tile_size: int, pad_id: int) -> Batch:
    bin_of_tokens, bin_of_tiles = (rows, config.tokens_per_bin), (rows, config.tiles_per_bin)
    return {
        "tokens": np.full(bin_of_tokens, pad_id, np.int32),
        "targets": np.full(bin_of_tokens, pad_id, np.int32),
        "loss_weights": np.zeros(bin_of_tokens, np.float32),
        "segment_ids": np.zeros(bin_of_tokens, np.int32),
        "positions": np.zeros(bin_of_tokens, np.int32),
        "visual_index": np.full(bin_of_tokens, -1, np.int32),
        "tiles": np.zeros((*bin_of_tiles, tile_size, tile_size, 3), np.uint8),
        "tile_valid_hw": np.zeros((*bin_of_tiles, 2), np.int32),
        "example_ids": np.full((rows, config.examples_per_bin), -1, np.int32),
        "num_examples": np.zeros(rows, np.int32),
        "num_cut": np.zeros(rows, np.int32),
        "num_refused": np.zeros(rows, np.int32),
    }


def _cut_text(chat: EncodedChat, max_text_tokens: int) -> EncodedChat:
    text_so_far = np.cumsum(chat.visual_index < 0)
    if text_so_far[-1] <= max_text_tokens:
        return chat
    # Position i ends an answer if it was a weighted target (of i - 1) and the token after it is not.
    weighted = chat.loss_weights > 0
    ends = np.append(False, weighted[:-1]) & ~weighted
    fitting = np.flatnonzero(ends & (text_so_far <= max_text_tokens))
    if not len(fitting):
        raise UserError(f"{text_so_far[-1]} text tokens, the limit is {max_text_tokens} and no answer ends before it")
    return EncodedChat(*(field[: fitting[-1] + 1] for field in chat))
