"""From data sets to packed batches, all of it: what a config says about data, and a stage's feed made of it.

    open_dataset     records                 `store.py`
    ExampleOrder     which comes when        `order.py`       mixture by weight, a new order every epoch
    ExampleReader    examples                `examples.py`    conversation -> tokens, images -> tiles
    Window           which share a bin       `window.py`
    Feed             batches                 `feeding.py`     ahead of the device, resumed exactly
    plan_stage       how many bins a step    `planning.py`

A record that cannot be used (unreadable picture, larger than a bin) never ends a run: it is named in the workdir's
`data_refused.jsonl` (`refusals.py`) and counted in the training log. Too many of them do end it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.conversations import Record, Task
from alignvlm_jax.data.examples import ExampleReader, Part, number_parts
from alignvlm_jax.data.images import DEFAULT_MAX_PIXELS
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.resampling import TokenGrid
from alignvlm_jax.data.tiling import TilingConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data are and how they become batches.

    root: the folder that holds the data sets.
    tiling, packing: how pages are cut and rows are filled.
    max_turns: ask at most so many of a record's questions at a time, with their images; None asks all.
    max_image_pixels: refuse larger pictures.
    max_refused: end the run when a larger share of the examples cannot be used (judged from the thousandth on).
    workers: processes that make examples; 0 takes `read_threads` of the training process, which serves small models.
    read_threads: threads that make examples where there are no workers.
    prefetch_batches: batches being made or ready at a time.
    """

    root: str = "data"
    tiling: TilingConfig = TilingConfig()
    packing: PackingConfig = PackingConfig()
    max_turns: int | None = None
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    max_refused: float = 0.01
    workers: int = 0
    read_threads: int = 2
    prefetch_batches: int = 2


class MixtureComponent(Protocol):
    """The fields of `config.stages.MixturePart` that the pipeline reads."""

    dataset: str
    split: str
    task: Task
    weight: float


def source_name(part: MixtureComponent) -> str:
    """The key of a part's records among the sources."""
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
) -> ExampleReader:
    """The examples of a stage.

    Args:
      sources: random-access records by `source_name`: "dataset/split".
      mixture: the parts that examples are drawn from, by weight.
      chat: how a conversation becomes tokens.
      data: all else that a config says.
      seed: hashed into the seed of the stage; give every stage its own.
      token_grid: rows and columns of one tile's visual tokens, after the connector.
      max_text_tokens: text tokens of an example (visual ones not counted); see `packing.cut_text`.

    Raises:
      UserError: a data set is empty, or its records have not what the task needs.
    """
    parts = [Part(source_name(part), sources[source_name(part)], part.task, part.weight) for part in mixture]
    reader = ExampleReader(
        number_parts(parts),
        chat,
        data.tiling,
        data.packing,
        token_grid,
        int(np.random.SeedSequence(seed).generate_state(1)[0]),
        max_text_tokens,
        data.max_turns,
        data.max_image_pixels,
    )
    reader.check_fields()
    return reader
