"""The data part of a config, and the reader of a stage's examples built from it.

The stages of the pipeline:

    open_dataset     records                 `store.py`
    make_groups      groups of records       `groups.py`      that show the same images (`group_questions`)
    ExampleOrder     order of the groups     `order.py`       mixture by weight, a new order every epoch
    ExampleReader    examples                `examples.py`    conversation -> tokens, images -> tiles
    plan_trees       trees of examples       `trees.py`       a page once, then a branch for each question
    Window           bins of examples        `window.py`
    Feed             batches                 `feeding.py`     prefetched, resumed exactly
    plan_stage       bins per step           `planning.py`

A record that cannot be used (unreadable image, larger than a bin) does not end a run. It is named in
`data_refused.jsonl` in the workdir (`refusals.py`) and counted in the training log. Too many such records do end it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.conversations import Record, Task
from alignvlm_jax.data.examples import ExampleReader, Part, number_parts
from alignvlm_jax.data.groups import Grouping, SameImages, make_groups, match, scan
from alignvlm_jax.data.images import DEFAULT_MAX_PIXELS
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.resampling import TokenGrid
from alignvlm_jax.data.tiling import TilingConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Location of the data, and settings for turning them into batches.

    Attributes:
      root: folder that holds the data sets.
      tiling: how pages are cut into tiles.
      packing: how rows are filled.
      group_questions: what happens to records of one data set that show the same images, and to the questions of a
        page. "off": each record is an example. "tree": each record, and each question of the task "qa", is a branch
        that sees the page and itself. "conversation": the records become one conversation, whose later turns see the
        earlier ones.
      max_turns: largest number of questions used per record, with their images; None uses all.
      max_image_pixels: larger images are refused.
      max_refused: share of refused examples above which the run ends (checked from the thousandth example on).
      workers: number of processes that make examples; 0 uses `read_threads` threads of the training process, which
        is enough for small models.
      read_threads: number of threads that make examples if `workers` is 0.
      prefetch_batches: number of batches kept ready or in progress ahead of the training loop.
    """

    root: str = "data"
    tiling: TilingConfig = TilingConfig()
    packing: PackingConfig = PackingConfig()
    group_questions: Grouping = "off"
    max_turns: int | None = None
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    max_refused: float = 0.01
    workers: int = 0
    read_threads: int = 2
    prefetch_batches: int = 2

    @property
    def branch_tokens(self) -> int | None:
        """Tb, the largest number of branch tokens in a bin; None without trees."""
        return self.packing.branch_tokens if self.group_questions == "tree" else None


class MixtureComponent(Protocol):
    """The fields of `config.stages.MixturePart` that the pipeline reads."""

    dataset: str
    split: str
    task: Task
    weight: float


def source_name(part: MixtureComponent) -> str:
    """Returns the key of a component's records in `sources` of `make_reader`."""
    return f"{part.dataset}/{part.split}"


def make_reader(
    sources: Mapping[str, Sequence[Record]],
    mixture: Sequence[MixtureComponent],
    chat: ChatTokenizer,
    data: DataConfig,
    *,
    seed: tuple[int, ...],
    token_grid: TokenGrid,
    max_text_tokens: int,
    same_images: Mapping[str, SameImages] | None = None,
) -> ExampleReader:
    """Returns the reader of a stage's examples.

    Args:
      sources: Random-access records, by the keys of `source_name` ("dataset/split").
      mixture: components to draw examples from, by weight.
      chat: tokenizer for conversations.
      data: the remaining data settings.
      seed: integers that are hashed into the stage's seed; use different ones for every stage.
      token_grid: rows and columns of one tile's visual tokens, after the connector.
      max_text_tokens: limit on an example's text tokens (visual tokens are not counted); see `packing.cut_text`.
      same_images: which records of each source show the same images; by default, all records are read to find out.

    Raises:
      UserError: if a data set is empty, or its records lack a field that the task needs.
    """
    parts = []
    for part in mixture:
        name, records, groups = source_name(part), sources[source_name(part)], None
        if data.group_questions != "off" and len(records):
            same = same_images[name] if same_images else match(scan(records, range(len(records)), name=name))
            groups = make_groups(same, part.task, data.group_questions, data.packing.examples_per_bin)
        parts.append(Part(name, records, part.task, part.weight, groups=groups))
    reader = ExampleReader(
        number_parts(parts),
        chat,
        data.tiling,
        data.packing,
        token_grid,
        # Hash the integers into the single seed that the reader takes.
        int(np.random.SeedSequence(seed).generate_state(1)[0]),
        max_text_tokens,
        data.max_turns,
        data.max_image_pixels,
        data.group_questions,
    )
    reader.check_fields()
    return reader
