"""From records to packed batches: shuffle, mix, ask, decode, tile, tokenize, pack.

A step takes exactly `global_batch` examples: step i packs examples i * G ... i * G + G - 1 of one endless order that
depends on the seed alone. The pipeline is a `grain.MapDataset` whose element i is the packed global batch of step i, so
any step can be asked for at any time, by any number of threads: to resume, start at the step the checkpoint names.

    sources = {"documents/train": open_dataset(...)}
    dataset = make_pipeline(sources, stage.mixture, chat, tiling, packing, global_batch=32, seed=0, tokens_per_tile=144)
    for step, batch in enumerate(iterate(dataset, start_step=120), start=120): ...

A record is a dict with `image` (the bytes of an image file), `id`, and what its tasks need: `transcription`,
`questions` and `answers`. A record that cannot be used (unreadable picture, larger than a bin) never ends a run: it is
logged by name and counted in the batch, which then holds fewer examples.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import grain
import numpy as np

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.images import DEFAULT_MAX_PIXELS, open_image
from alignvlm_jax.data.packing import Batch, Example, PackingConfig, Refused, make_example, pack
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError

Record = Mapping[str, Any]
Task = Literal["transcribe", "qa", "mixed"]

TRANSCRIBE_INSTRUCTION = "Read the page."

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data are and how they become batches.

    root: the folder that holds the data sets.
    tiling, packing: how pages are cut and rows are filled.
    max_turns: of a page's questions, ask at most so many at a time; None asks all.
    max_image_pixels: refuse larger pictures.
    read_threads: batches made at the same time.
    prefetch_batches: batches kept ready.
    """

    root: str = "data"
    tiling: TilingConfig = TilingConfig()
    packing: PackingConfig = PackingConfig()
    max_turns: int | None = None
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    read_threads: int = 2
    prefetch_batches: int = 4


class MixturePart(Protocol):
    """What is read of a stage's `training.stages.MixturePart`."""

    dataset: str
    split: str
    task: Task
    weight: float


def source_name(part: MixturePart) -> str:
    """The key of a part's records among the sources."""
    return f"{part.dataset}/{part.split}"


def make_pipeline(
    sources: Mapping[str, Sequence[Record]],
    mixture: Sequence[MixturePart],
    chat: ChatTokenizer,
    tiling: TilingConfig,
    packing: PackingConfig,
    *,
    global_batch: int,
    seed: int,
    tokens_per_tile: int,
    max_text_tokens: int = 2048,
    max_turns: int | None = None,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
) -> grain.MapDataset:
    """The endless data set of packed steps.

    Args:
      sources: random-access records by `source_name`: "dataset/split".
      mixture: the parts that examples are drawn from, by weight. Each runs through its records in a new order every
        epoch.
      chat, tiling, packing: how a record becomes tokens and tiles, and those a row.
      global_batch: examples a step.
      seed: everything random follows from it; give every stage its own.
      tokens_per_tile: visual tokens of one tile, after the connector.
      max_text_tokens: text tokens of an example (visual ones not counted); see `packing.make_example`.
      max_turns, max_image_pixels: see `DataConfig`.
    """
    first_number = _first_numbers(sources, mixture)
    parts = []
    for i, part in enumerate(mixture):
        name = source_name(part)
        # Hashed, because grain shuffles epoch e by seed + e: neighbouring seeds would repeat each other's orders.
        shuffle_seed, task_seed = np.random.SeedSequence((seed, i)).generate_state(2).tolist()
        prepare = PrepareExample(
            name, part.task, chat, tiling, packing, tokens_per_tile, max_text_tokens, max_turns, max_image_pixels
        )
        parts.append(
            grain.MapDataset.source(_Numbered(sources[name], first_number[name]))
            .shuffle(seed=shuffle_seed)
            .repeat()
            .random_map(prepare, seed=task_seed)
        )
    if len(parts) == 1:
        examples = parts[0]
    else:
        examples = grain.MapDataset.mix(parts, weights=[part.weight for part in mixture])

    def pack_step(members: Sequence[Example | Refused]) -> Batch:
        return pack(members, packing, tokens_per_tile=tokens_per_tile, tile_size=tiling.tile_size, pad_id=chat.pad_id)

    return examples.batch(global_batch, batch_fn=pack_step)


def iterate(
    dataset: grain.MapDataset, *, start_step: int = 0, read_threads: int = 2, prefetch_batches: int = 4
) -> Iterator[Batch]:
    """The batches of `start_step`, `start_step + 1`, ..., made ahead by threads."""
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=prefetch_batches)
    return iter(dataset[start_step:].to_iter_dataset(options))


def steps_per_epoch(sources: Mapping[str, Sequence[Record]], mixture: Sequence[MixturePart], global_batch: int) -> int:
    """Steps that draw as many examples as the mixture's parts have records (one named twice counts twice)."""
    _first_numbers(sources, mixture)
    return -(-sum(len(sources[source_name(part)]) for part in mixture) // global_batch)


def locate_example(
    sources: Mapping[str, Sequence[Record]], mixture: Sequence[MixturePart], number: int
) -> tuple[str, int]:
    """The source and index of the record that an entry of `example_ids` stands for."""
    for name, first in _first_numbers(sources, mixture).items():
        if first <= number < first + len(sources[name]):
            return name, number - first
    raise ValueError(f"no example has the number {number}")


def conversation(
    record: Record, task: Task, rng: np.random.Generator, max_turns: int | None = None
) -> list[dict[str, Any]]:
    """What is said about a page: the instruction to read it and its text, or its questions in random order.

    "mixed" decides for one or the other by a fair coin: a conversation holding both would let the questions be answered
    from the transcription instead of the page.
    """
    if task == "mixed":
        task = "transcribe" if rng.random() < 0.5 else "qa"
    if task == "transcribe":
        turns = [(TRANSCRIBE_INSTRUCTION, _field(record, "transcription"))]
    elif task == "qa":
        questions, answers = _field(record, "questions"), _field(record, "answers")
        if len(questions) != len(answers) or not len(questions):
            raise UserError(f"the record has {len(questions)} questions and {len(answers)} answers")
        turns = [(questions[i], answers[i]) for i in rng.permutation(len(questions))[:max_turns]]
    else:
        raise ValueError(f"task: expected 'transcribe', 'qa' or 'mixed', got {task!r}")
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    messages[0]["content"].insert(0, {"type": "image"})  # Vision first.
    return messages


@dataclasses.dataclass(frozen=True)
class PrepareExample:
    """Turns a numbered record into an example, or into the reason why it is refused."""

    source_name: str
    task: Task
    chat: ChatTokenizer
    tiling: TilingConfig
    packing: PackingConfig
    tokens_per_tile: int
    max_text_tokens: int
    max_turns: int | None
    max_image_pixels: int

    def __call__(self, numbered: tuple[int, Record], rng: np.random.Generator) -> Example | Refused:
        number, record = numbered
        try:
            messages = conversation(record, self.task, rng, self.max_turns)
            image = open_image(_field(record, "image"), name="image", max_pixels=self.max_image_pixels)
            plan = plan_tiles(*image.size, self.tiling)
            encoded = self.chat.encode(messages, [plan.num_tiles * self.tokens_per_tile])
            tiles, valid_hw = cut_tiles(image, plan, self.tiling.tile_size)
            return make_example(
                number,
                encoded,
                tiles,
                valid_hw,
                self.packing,
                tokens_per_tile=self.tokens_per_tile,
                max_text_tokens=self.max_text_tokens,
            )
        except UserError as error:
            _log.warning("refused example %s of %s: %s", record.get("id", number), self.source_name, error)
            return Refused(number, str(error))


class _Numbered:
    """Records with their number, counted on over all sources."""

    def __init__(self, source: Sequence[Record], first: int):
        self._source, self._first = source, first

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Record]:
        return self._first + index, self._source[index]


def _first_numbers(sources: Mapping[str, Sequence[Record]], mixture: Sequence[MixturePart]) -> dict[str, int]:
    """The number of each source's first record, sources counted in the order the mixture names them."""
    if not mixture:
        raise UserError("the mixture has no parts")
    first, numbers = 0, {}
    for part in mixture:
        name = source_name(part)
        if name not in sources:
            raise UserError(f"no data set {name!r}; there are: {', '.join(sorted(sources)) or 'none'}")
        if not len(sources[name]):
            raise UserError(f"the data set {name!r} is empty")
        if not part.weight > 0:
            raise UserError(f"the weight of {name!r} in the mixture must be positive, got {part.weight}")
        if name not in numbers:
            numbers[name] = first
            first += len(sources[name])
    return numbers


def _field(record: Record, name: str) -> Any:
    if name not in record:
        raise UserError(f"the record has no field {name!r}")
    return record[name]
