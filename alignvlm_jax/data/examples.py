"""Makes examples from records: reads, tokenizes and cuts them into tiles.

An example is identified by its position in the order of the stage, and is made in two passes. `measure` returns the
size of an example, for which it reads the size of each image but not its pixels; this is enough to decide which
examples share a bin. `make` then decodes the images. Both are functions of the position alone. Any process can
therefore make any example, and waiting examples need no memory beyond their sizes.

An example that cannot be used (unreadable, no answer within the limit on text, larger than a bin) is returned as
`Refused`, so that one bad record does not end a run.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from alignvlm_jax.data.chat import ChatTokenizer, EncodedChat
from alignvlm_jax.data.conversations import FIELDS, Record, Task, make_conversation
from alignvlm_jax.data.images import DEFAULT_MAX_PIXELS, image_size, open_image
from alignvlm_jax.data.order import ExampleOrder
from alignvlm_jax.data.packing import Example, PackingConfig, Refused, check_fits, cut_text
from alignvlm_jax.data.resampling import TokenGrid, num_visual_tokens, resample_images
from alignvlm_jax.data.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.data.window import MeasuredExample
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
      name: name of the data set in messages.
      records: random access to dicts with `id` and the fields that the task reads.
      task: task of the examples; see `conversations.py`.
      weight: share of the examples, relative to the other parts.
      first_number: number of its first record in `example_ids`.
    """

    name: str
    records: Sequence[Record]
    task: Task
    weight: float = 1.0
    first_number: int = 0


@dataclasses.dataclass(frozen=True)
class ExampleReader:
    """All examples of a stage, by their position in its order. Picklable if the records are.

    Attributes:
      parts: the mixture.
      chat: tokenizer for conversations.
      tiling: how images are cut into tiles.
      packing: limits of a bin.
      token_grid: rows and columns of one tile's visual tokens, after the connector.
      seed: seed of all random choices; use a different one for every stage.
      max_text_tokens: limit on an example's text tokens (visual tokens are not counted); see `packing.cut_text`.
      max_turns: see `pipeline.DataConfig`.
      max_image_pixels: see `pipeline.DataConfig`.
    """

    parts: tuple[Part, ...]
    chat: ChatTokenizer
    tiling: TilingConfig
    packing: PackingConfig
    token_grid: TokenGrid
    seed: int
    max_text_tokens: int = 2048
    max_turns: int | None = None
    max_image_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        if not self.parts:
            raise UserError("the mixture has no parts")
        for part in self.parts:
            if not len(part.records):
                raise UserError(f"the data set {part.name!r} is empty")
            if not part.weight > 0:
                raise UserError(f"the weight of {part.name!r} in the mixture must be positive, got {part.weight}")

    @functools.cached_property
    def order(self) -> ExampleOrder:
        """The endless order of the stage: a part and a record for each position."""
        lengths = tuple(len(part.records) for part in self.parts)
        return ExampleOrder(lengths, tuple(part.weight for part in self.parts), self.seed)

    @property
    def tokens_per_tile(self) -> int:
        """N, the number of visual tokens per tile after the connector."""
        return math.prod(self.token_grid)

    @property
    def num_records(self) -> int:
        """Number of records of all parts together: the examples of one epoch."""
        return sum(len(part.records) for part in self.parts)

    def check_fields(self) -> None:
        """Raises a `UserError` if the first record of a data set lacks a field that its task reads."""
        for part in self.parts:
            record = part.records[0]
            for field in FIELDS[part.task]:
                if field not in record:
                    possible_tasks = [task for task, fields in FIELDS.items() if all(name in record for name in fields)]
                    raise UserError(
                        f"{part.name}: the task {part.task!r} reads the field {field!r}, but the records have only "
                        f"{', '.join(record)}. Tasks for such records: {', '.join(possible_tasks) or 'none'}"
                    )

    def measure(self, position: int) -> MeasuredExample | Refused:
        """Returns the size of the example at this position."""
        prepared = self._prepare(position)
        if isinstance(prepared, Refused):
            return prepared
        return MeasuredExample(position, len(prepared.chat.tokens), sum(plan.num_tiles for plan in prepared.plans))

    def make(self, measured: MeasuredExample) -> Example | Refused:
        """Returns the example that was measured."""
        prepared = self._prepare(measured.position)
        if isinstance(prepared, Refused):
            return prepared
        # Damage to an image may show only now, when its pixels are decoded.
        try:
            tiles, valid_hw = self._cut_images(prepared)
        except UserError as error:
            return dataclasses.replace(prepared.refused, reason=str(error))
        resampling = resample_images(prepared.plans, self.tiling, self.token_grid)
        return Example(prepared.number, *prepared.chat, tiles, valid_hw, prepared.was_cut, resampling)

    def _prepare(self, position: int) -> "_PreparedExample | Refused":
        """Returns everything about an example except its pixels."""
        part_index, index = self.order[position]
        part = self.parts[part_index]
        record = part.records[index]
        refused = Refused(str(record.get("id", index)), part.name, "")
        try:
            # The position seeds the random choices, so that `measure` and `make` see the same conversation.
            rng = np.random.default_rng((self.seed, position))
            messages, images = make_conversation(record, part.task, rng, self.max_turns)
            # Sizes come from the headers of the images; pixels are not needed yet.
            plans = [
                plan_tiles(
                    *image_size(image, name=_image_name(i, images), max_pixels=self.max_image_pixels), self.tiling
                )
                for i, image in enumerate(images)
            ]
            tokens_per_image = [num_visual_tokens(plan, self.tiling, self.token_grid) for plan in plans]
            full_chat = self.chat.encode(messages, tokens_per_image)
            chat = cut_text(full_chat, self.max_text_tokens)
            # Drop the images whose tokens were cut off with the text. `cut_text` never cuts through an image, so the
            # images that stay are those that end within the remaining visual tokens.
            kept = int(np.searchsorted(np.cumsum(tokens_per_image), np.sum(chat.visual_index >= 0), side="right"))
            check_fits(chat, sum(plan.num_tiles for plan in plans[:kept]), self.packing)
        except UserError as error:
            return dataclasses.replace(refused, reason=str(error))
        was_cut = len(chat.tokens) < len(full_chat.tokens)
        return _PreparedExample(part.first_number + index, chat, was_cut, plans[:kept], images[:kept], refused)

    def _cut_images(self, prepared: "_PreparedExample") -> tuple[np.ndarray, np.ndarray]:
        """Decodes the images and cuts their tiles."""
        side = self.tiling.tile_size
        # The empty arrays give the result its shape if there are no images.
        tiles, valid_hw = [np.zeros((0, side, side, 3), np.uint8)], [np.zeros((0, 2), np.int32)]
        for i, (data, plan) in enumerate(zip(prepared.images, prepared.plans, strict=True)):
            name = _image_name(i, prepared.images)
            image = open_image(data, name=name, max_pixels=self.max_image_pixels, keep_gray=True)
            if image.size != plan.image_size:
                raise UserError(
                    f"{name}: the decoded image has {image.size} pixels, but its header says {plan.image_size}"
                )
            image_tiles, image_valid_hw = cut_tiles(image, plan, side)
            tiles.append(image_tiles)
            valid_hw.append(image_valid_hw)
        return np.concatenate(tiles), np.concatenate(valid_hw)


@dataclasses.dataclass(frozen=True)
class _PreparedExample:
    """An example without its pixels; `refused` lacks only the reason, for images that turn out to be unusable."""

    number: int
    chat: EncodedChat
    was_cut: bool
    plans: Sequence[TilePlan]
    images: Sequence[bytes]
    refused: Refused


def number_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Returns the parts with `first_number` set; records are numbered consecutively, once per data set."""
    # Several parts may draw from one data set (with different tasks); they share the numbers of its records.
    first_numbers: dict[str, int] = {}
    next_number = 0
    for part in parts:
        if part.name not in first_numbers:
            first_numbers[part.name] = next_number
            next_number += len(part.records)
    return tuple(dataclasses.replace(part, first_number=first_numbers[part.name]) for part in parts)


def locate_example(parts: Sequence[Part], number: int) -> tuple[str, int]:
    """Returns the name of the data set, and the index in it, of the record with this entry in `example_ids`."""
    for part in parts:
        if part.first_number <= number < part.first_number + len(part.records):
            return part.name, number - part.first_number
    raise ValueError(f"no example has the number {number}")


def _image_name(index: int, images: Sequence[bytes]) -> str:
    """Returns the name of an image in error messages."""
    return "image" if len(images) == 1 else f"image {index + 1}"
