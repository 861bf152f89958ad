"""Writes examples into rows of static shape, within two budgets: text positions and tiles.

Axis letters: K microbatches, b rows of a microbatch, L positions per bin, M tiles per bin, S tile side, N visual tokens
per tile (after the connector), X examples per bin, n tokens and m tiles of one example.

A bin is one row. It holds complete examples, one after the other; `window.py` decides which ones. Here are two examples
with N = 2 as the tokenizer returns them (i: image placeholder, letters: text; loss weights belong to targets, see
`chat.py`):

    example 4, two tiles  tokens         b  u  i  i  i  i  s  y  e
                          visual_index   -  -  0  1  2  3  -  -  -
                          loss_weights   0  0  0  0  0  0  1  1  0        y e is the answer
    example 7, one tile   tokens         b  u  i  i  q  s  x  e
                          visual_index   -  -  0  1  -  -  -  -
                          loss_weights   0  0  0  0  0  1  1  0

packed into a bin of L = 20, M = 4, where p is padding:

    tokens          b  u  i  i  i  i  s  y  e  b  u  i  i  q  s  x  e  p  p  p
    targets         u  i  i  i  i  s  y  e  p  u  i  i  q  s  x  e  p  p  p  p
    loss_weights    0  0  0  0  0  0  1  1  0  0  0  0  0  0  1  1  0  0  0  0
    segment_ids     1  1  1  1  1  1  1  1  1  2  2  2  2  2  2  2  2  0  0  0
    positions       0  1  2  3  4  5  6  7  8  0  1  2  3  4  5  6  7  0  0  0
    visual_index    -  -  0  1  2  3  -  -  -  -  -  4  5  -  -  -  -  -  -  -
    tiles           [4's first, 4's second, 7's, empty]       tile m's visual tokens are m * N ... m * N + N - 1
    example_ids     4  7 -1 -1 ...

The last target of an example would be the first token of the next example, so it is padding and has weight 0.

With trees (`config.data.group_questions = "tree"`), questions about the same images share one segment. It holds the
page once, and then the branches: the rest of each question with its answer (`trees.py`). A batch of trees has one more
field, `branch_ids`: 0 for pages, ordinary examples and padding; 1, 2, ... number the branches of a segment. Query q
attends to key k if both are of the same segment, k <= q, and k belongs to the page or to q's branch. In every branch,
positions continue from the end of the page. A token's target is the next token of its own branch. The last token of a
page and of a branch have none:

    tokens          b  u  i  i  q  s  y  e  r  s  z  z  e      page: b u i i   branches: q s y e | r s z z e
    targets         u  i  i  p  s  y  e  p  s  z  z  e  p
    loss_weights    0  0  0  0  0  1  1  0  0  1  1  1  0
    segment_ids     1  1  1  1  1  1  1  1  1  1  1  1  1
    branch_ids      0  0  0  0  1  1  1  1  2  2  2  2  2
    positions       0  1  2  3  4  5  6  7  4  5  6  7  8
    example_ids     4  5 -1 -1 ...                             the record of each branch

The page ends before the first answer of any branch, so every target with weight is predicted from a token of its
branch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from alignvlm_jax.data.chat import EncodedChat
from alignvlm_jax.data.resampling import Resampling, at_positions
from alignvlm_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """The static shapes of a batch.

    Attributes:
      tokens_per_bin: L, text and visual tokens together.
      tiles_per_bin: M.
      bins_per_microbatch: B, a multiple of the number of devices that a batch is sharded over. The examples are dealt
        out to this number of rows, and each row is packed independently; see `feeding.py`.
      examples_per_bin: X, the largest number of examples in a bin. Each branch of a tree counts as one.
      window: number of examples of a row that wait to be packed together; see `window.py`.
      branch_tokens_per_bin: Tb, the largest number of tokens in the branches of a bin's trees. The training step
        gathers this number of tokens per row, so a large one costs time and memory. None means L up to L = 1,024, then
        1,024, and L / 8 from L = 8,192 on.
    """

    tokens_per_bin: int = 8192
    tiles_per_bin: int = 10
    bins_per_microbatch: int = 8
    examples_per_bin: int = 32
    window: int = 32
    branch_tokens_per_bin: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "tiles_per_bin" else 1
            if value is not None and value < least:
                raise ValueError(f"PackingConfig.{field.name}: expected at least {least}, got {value}")
        if self.branch_tokens > self.tokens_per_bin:
            raise ValueError(
                f"PackingConfig.branch_tokens_per_bin: expected at most tokens_per_bin ({self.tokens_per_bin}), got "
                f"{self.branch_tokens_per_bin}"
            )

    @property
    def branch_tokens(self) -> int:
        """Tb, also where `branch_tokens_per_bin` is None."""
        if self.branch_tokens_per_bin is not None:
            return self.branch_tokens_per_bin
        return max(min(self.tokens_per_bin, 1024), self.tokens_per_bin // 8)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation, or one tree of conversations, with its tiles, ready to be packed.

    Attributes:
      numbers: entries in `example_ids`: the record of each branch of a tree, or of each part of a conversation.
      tokens: token ids; an image placeholder stands for each visual token. A tree has its page first.
      loss_weights: weight of the target that follows each token.
      visual_index: index of the visual token at each position; -1 for text.
      tiles: pixels of all images' tiles.
      valid_hw: height and width of the image inside each tile.
      num_cut: number of conversations whose last turns were dropped to stay within the limit on text.
      resampling: sources of each visual token, under the tiling rule anyres_max_9.
      branch_ids: branch of each token of a tree, 0 for its page; None for one conversation.
    """

    numbers: tuple[int, ...]
    tokens: Int32[np.ndarray, " n"]
    loss_weights: Float32[np.ndarray, " n"]
    visual_index: Int32[np.ndarray, " n"]
    tiles: UInt8[np.ndarray, "m S S 3"]
    valid_hw: Int32[np.ndarray, "m 2"]
    num_cut: int = 0
    resampling: Resampling | None = None
    branch_ids: Int32[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class Refused:
    """An example that cannot be used: unreadable, or too large for a bin.

    Attributes:
      id: id of the record.
      source: name of its data set.
      reason: readable explanation.
    """

    id: str
    source: str
    reason: str


def cut_text(chat: EncodedChat, max_text_tokens: int) -> EncodedChat:
    """Returns an example's tokens, truncated to `max_text_tokens` text tokens (visual tokens are not counted).

    Longer conversations are truncated at the end of the last answer that fits. An image is kept or dropped as a whole.

    Raises:
      UserError: if no answer ends within the limit.
    """
    text_so_far = np.cumsum(chat.visual_index < 0)
    if text_so_far[-1] <= max_text_tokens:
        return chat
    # Token i ends an answer if it is a target with weight (at position i - 1) and token i + 1 is not.
    weighted = chat.loss_weights > 0
    ends = np.append(False, weighted[:-1]) & ~weighted
    fitting = np.flatnonzero(ends & (text_so_far <= max_text_tokens))
    if not len(fitting):
        raise UserError(
            f"the example has {text_so_far[-1]} text tokens and no answer ends within the limit of {max_text_tokens}"
        )
    return EncodedChat(*(field[: fitting[-1] + 1] for field in chat))


def check_fits(chat: EncodedChat, num_tiles: int, config: PackingConfig) -> None:
    """Raises a `UserError` if an example does not fit into an empty bin."""
    if len(chat.tokens) > config.tokens_per_bin:
        num_visual = int(np.sum(chat.visual_index >= 0))
        raise UserError(
            f"the example has {len(chat.tokens)} tokens ({num_visual} visual), a bin holds {config.tokens_per_bin}"
        )
    if num_tiles > config.tiles_per_bin:
        raise UserError(f"the example has {num_tiles} tiles, a bin holds {config.tiles_per_bin}")


def empty_batch(
    microbatches: int,
    rows: int,
    config: PackingConfig,
    *,
    tile_size: int,
    pad_id: int,
    resampled: bool = False,
    is_tree: bool = False,
) -> Batch:
    """Returns a batch of bins without examples, [K, b, ...].

    Besides the model's inputs, each bin has counters for the training log: `num_examples`, `num_cut` (truncated
    examples) and `num_refused` (examples refused while the bin was filled). `resampled` adds the inputs of the tiling
    rule anyres_max_9: `visual_sources` and `visual_weights` (see `resampling.py`). `is_tree` adds `branch_ids`.
    """
    lead = (microbatches, rows)
    bin_of_tokens, bin_of_tiles = (*lead, config.tokens_per_bin), (*lead, config.tiles_per_bin)
    resampling = {
        "visual_sources": np.zeros((*bin_of_tokens, 4), np.int32),
        "visual_weights": np.zeros((*bin_of_tokens, 4), np.float32),
    }
    return {
        "tokens": np.full(bin_of_tokens, pad_id, np.int32),
        "targets": np.full(bin_of_tokens, pad_id, np.int32),
        "loss_weights": np.zeros(bin_of_tokens, np.float32),
        "segment_ids": np.zeros(bin_of_tokens, np.int32),
        "positions": np.zeros(bin_of_tokens, np.int32),
        "visual_index": np.full(bin_of_tokens, -1, np.int32),
        "tiles": np.zeros((*bin_of_tiles, tile_size, tile_size, 3), np.uint8),
        "tile_valid_hw": np.zeros((*bin_of_tiles, 2), np.int32),
        "example_ids": np.full((*lead, config.examples_per_bin), -1, np.int32),
        "num_examples": np.zeros(lead, np.int32),
        "num_cut": np.zeros(lead, np.int32),
        "num_refused": np.zeros(lead, np.int32),
        **(resampling if resampled else {}),
        **({"branch_ids": np.zeros(bin_of_tokens, np.int32)} if is_tree else {}),
    }


def write_bin(batch: Batch, index: tuple[int, int], examples: Sequence[Example], tokens_per_tile: int) -> None:
    """Writes examples to the empty bin with this index, (microbatch, row); they must fit."""
    start = tile = token = number = 0  # the first free position, tile, visual token and entry of `example_ids`
    for segment, example in enumerate(examples, start=1):
        n, m, visual = len(example.tokens), len(example.tiles), example.visual_index
        # The example's positions and tiles in the bin.
        span, tile_span = (*index, slice(start, start + n)), (*index, slice(tile, tile + m))
        batch["tokens"][span] = example.tokens
        batch["loss_weights"][span] = example.loss_weights
        batch["segment_ids"][span] = segment  # 0 is padding
        branch_ids = np.zeros(n, np.int32) if example.branch_ids is None else example.branch_ids
        if example.branch_ids is not None:
            batch["branch_ids"][span] = branch_ids
        # The last token of a page and of a branch has no target, which leaves padding.
        has_target = np.flatnonzero(branch_ids[1:] == branch_ids[:-1])
        batch["targets"][*index, start + has_target] = example.tokens[has_target + 1]
        batch["positions"][span] = _tree_positions(branch_ids)
        # Visual tokens are numbered through the whole bin, not per example.
        batch["visual_index"][span] = np.where(visual >= 0, visual + token, -1)
        batch["tiles"][tile_span] = example.tiles
        batch["tile_valid_hw"][tile_span] = example.valid_hw
        batch["example_ids"][*index, number : number + len(example.numbers)] = example.numbers
        batch["num_cut"][index] += example.num_cut
        if example.resampling is not None:
            # Sources count features, of which every tile has N; `tile` tiles come before this example's.
            sources, weights = at_positions(visual, example.resampling, tile * tokens_per_tile)
            batch["visual_sources"][span], batch["visual_weights"][span] = sources, weights
        start, tile, token = start + n, tile + m, token + int(np.sum(visual >= 0))
        number += len(example.numbers)
    batch["num_examples"][index] = number


def _tree_positions(branch_ids: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    """Returns the positions of a tree's tokens: every branch continues from the end of the page."""
    index = np.arange(len(branch_ids))
    # Index of the first token of each token's page or branch.
    first = np.maximum.accumulate(np.where(np.diff(branch_ids, prepend=0), index, 0))
    page_length = np.count_nonzero(branch_ids == 0)
    return (index - first + np.where(branch_ids > 0, page_length, 0)).astype(np.int32)


def fill_fractions(batch: Batch) -> dict[str, float]:
    """Returns the fractions of a packed batch's token slots and tile slots that are in use."""
    return {
        "tokens": float(np.mean(batch["segment_ids"] > 0)),
        "tiles": float(np.mean(batch["tile_valid_hw"][..., 0] > 0)) if batch["tile_valid_hw"].size else 1.0,
    }
