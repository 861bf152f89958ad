"""Makes examples from records: reads, tokenizes and cuts them into tiles.

An example is identified by its position in the order of the stage, and is made in two passes. `measure` returns the
size of an example, for which it reads the size of each image but not its pixels; this is enough to decide which
examples share a bin. `make` then decodes the images. Both are functions of the position alone. Any process can
therefore make any example, and waiting examples need no memory beyond their sizes.

With `grouping`, a position of the order is a group of records that show the same images (`groups.py`). They become the
branches of a tree, or one conversation (`trees.py`). A group that is too large for a bin becomes several examples, and
so does one whose conversations begin differently. A record that cannot be used only loses its own place in the group.

An example that cannot be used (unreadable, no answer within the limit on text, larger than a bin) is returned as
`Refused`, so that one bad record does not end a run.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data.chat import ChatTokenizer, EncodedChat, Message
from alignvlm_jax.data.conversations import FIELDS, Conversation, Record, Task, make_branches, make_conversation
from alignvlm_jax.data.groups import Grouping, RecordGroups
from alignvlm_jax.data.images import DEFAULT_MAX_PIXELS, image_size, open_image
from alignvlm_jax.data.order import ExampleOrder
from alignvlm_jax.data.packing import Example, PackingConfig, Refused, check_fits, cut_text
from alignvlm_jax.data.resampling import TokenGrid, num_visual_tokens, resample_images
from alignvlm_jax.data.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.data.trees import join_branches, join_messages, joint_key, plan_trees
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
      groups: groups of records that show the same images; None where every record is on its own.
    """

    name: str
    records: Sequence[Record]
    task: Task
    weight: float = 1.0
    first_number: int = 0
    groups: RecordGroups | None = None

    @property
    def num_groups(self) -> int:
        """Number of groups, or of records without grouping."""
        return len(self.records if self.groups is None else self.groups)

    @property
    def group_weight(self) -> Fraction:
        """Share of the positions of the order. `weight` is a share of the examples, and a group has several of them."""
        questions = self.num_groups if self.groups is None else Fraction(self.groups.num_questions)
        return Fraction(self.weight) * self.num_groups / questions


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
      grouping: see `pipeline.DataConfig`; the parts have groups unless it is "off".
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
    grouping: Grouping = "off"

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
        """The endless order of the stage: a part and a group of its records (or one record) for each position."""
        lengths = tuple(part.num_groups for part in self.parts)
        return ExampleOrder(lengths, tuple(part.group_weight for part in self.parts), self.seed)

    @property
    def tokens_per_tile(self) -> int:
        """N, the number of visual tokens per tile after the connector."""
        return math.prod(self.token_grid)

    @property
    def num_groups(self) -> int:
        """Number of groups of all parts, or of records without grouping: the positions of an epoch."""
        return sum(part.num_groups for part in self.parts)

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

    def measure(self, position: int) -> list[MeasuredExample | Refused]:
        """Returns the sizes of the examples at this position, and its records that cannot be used."""
        examples, refused = self._prepare(position)
        return [*refused, *(example.measured(position, index) for index, example in enumerate(examples))]

    def make(self, measured: MeasuredExample) -> Example | tuple[Refused, ...]:
        """Returns the example that was measured, or all its records if its images cannot be used."""
        examples, _ = self._prepare(measured.position)
        example = examples[measured.index]
        # Damage to an image may show only now, when its pixels are decoded.
        try:
            tiles, valid_hw = self._cut_images(example)
        except UserError as error:
            return tuple(dataclasses.replace(refused, reason=str(error)) for refused in example.refused)
        resampling = resample_images(example.plans, self.tiling, self.token_grid)
        return Example(
            example.numbers, *example.chat, tiles, valid_hw, example.num_cut, resampling, branch_ids=example.branch_ids
        )

    def _prepare(self, position: int) -> "tuple[list[_PreparedExample], list[Refused]]":
        """Returns everything about the examples at a position except their pixels, and the records that are refused."""
        part_index, group = self.order[position]
        part = self.parts[part_index]
        # The position seeds the random choices, so that `measure` and `make` see the same conversations.
        rng = np.random.default_rng((self.seed, position))
        conversations, refused = [], []
        for conversation in self._read_group(part, group, rng):
            if isinstance(conversation, Refused):
                refused.append(conversation)
                continue
            try:
                conversations.append(self._encode(conversation))
            except UserError as error:
                refused.append(dataclasses.replace(conversation.refused, reason=str(error)))
        if self.grouping == "tree":
            return list(self._make_trees(conversations)), refused
        if self.grouping == "conversation":
            return list(self._join(conversations)), refused
        return [_alone(conversation) for conversation in conversations], refused

    def _read_group(self, part: Part, group: int, rng: np.random.Generator) -> "Iterator[_NamedConversation | Refused]":
        """Yields the conversations of a group of records, in random order, and its records that cannot be used."""
        indices = [group] if part.groups is None else part.groups[group]
        # Without groups, nothing is drawn here, so the task makes the same choices as in earlier versions.
        for index in indices if len(indices) == 1 else rng.permutation(indices).tolist():
            record = part.records[index]
            refused = Refused(str(record.get("id", index)), part.name, "")
            try:
                if self.grouping == "tree":
                    conversations = make_branches(record, part.task, rng, self.max_turns)
                else:
                    conversations = [make_conversation(record, part.task, rng, self.max_turns)]
            except UserError as error:
                yield dataclasses.replace(refused, reason=str(error))
                continue
            for conversation in conversations:
                yield _NamedConversation(part.first_number + index, conversation, refused)

    def _encode(self, named: "_NamedConversation") -> "_EncodedConversation":
        """Encodes a conversation; raises a `UserError` if it cannot be used."""
        messages, images = named.conversation
        # Sizes come from the headers of the images; pixels are not needed yet.
        plans = [
            plan_tiles(*image_size(image, name=_image_name(i, images), max_pixels=self.max_image_pixels), self.tiling)
            for i, image in enumerate(images)
        ]
        tokens_per_image = [num_visual_tokens(plan, self.tiling, self.token_grid) for plan in plans]
        full_chat = self.chat.encode(messages, tokens_per_image)
        chat = cut_text(full_chat, self.max_text_tokens)
        # Drop the images whose tokens were cut off with the text. `cut_text` never cuts through an image, so the
        # images that stay are those that end within the remaining visual tokens.
        kept = int(np.searchsorted(np.cumsum(tokens_per_image), np.sum(chat.visual_index >= 0), side="right"))
        check_fits(chat, sum(plan.num_tiles for plan in plans[:kept]), self.packing)
        was_cut = len(chat.tokens) < len(full_chat.tokens)
        return _EncodedConversation(named, messages, chat, was_cut, tuple(plans[:kept]), tuple(images[:kept]))

    def _make_trees(self, conversations: "Sequence[_EncodedConversation]") -> "Iterator[_PreparedExample]":
        """Yields the trees of a group, and the conversations that share no page."""
        # The images themselves are compared, so that equal digests cannot mix up two pages.
        images = [conversation.images for conversation in conversations]
        for tree in plan_trees([conversation.chat for conversation in conversations], images, self.packing):
            members = [conversations[i] for i in tree.members]
            if len(members) == 1:
                yield _alone(members[0])
                continue
            chat, branch_ids = join_branches([member.chat for member in members], tree.page_length)
            yield dataclasses.replace(_together(members, chat), branch_ids=branch_ids)

    def _join(self, conversations: "Sequence[_EncodedConversation]") -> "Iterator[_PreparedExample]":
        """Yields the conversations of a group, joined into as few as the limits allow in this order."""
        alike: dict[object, list[_EncodedConversation]] = {}
        for i, conversation in enumerate(conversations):
            # One that was cut is as long as it may be.
            key = None if conversation.was_cut else joint_key(conversation.messages)
            alike.setdefault(i if key is None else (key, conversation.images), []).append(conversation)
        for members in alike.values():
            visual = sum(members[0].chat.visual_index >= 0)
            room = min(self.max_text_tokens, self.packing.tokens_per_bin - int(visual))
            joined, text = [], 0
            for member in members:
                length = len(member.chat.tokens) - int(visual)
                if joined and (text + length > room or len(joined) == self.packing.examples_per_bin):
                    yield from self._join_all(joined)
                    joined, text = [], 0
                joined.append(member)
                text += length
            yield from self._join_all(joined)

    def _join_all(self, members: "Sequence[_EncodedConversation]") -> "Iterator[_PreparedExample]":
        """Yields one conversation, or its halves where a chat template makes it longer than its parts or refuses it."""
        if len(members) == 1:
            yield _alone(members[0])
            return
        messages = join_messages([member.messages for member in members])
        try:
            joined = self._encode(
                members[0].named._replace(conversation=Conversation(messages, list(members[0].images)))
            )
        except UserError:
            joined = None
        if joined is not None and not joined.was_cut:
            yield _together(members, joined.chat)
            return
        half = len(members) // 2
        yield from self._join_all(members[:half])
        yield from self._join_all(members[half:])

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


class _NamedConversation(NamedTuple):
    """A conversation, the number of its record, and its name for messages."""

    number: int
    conversation: Conversation
    refused: Refused


class _EncodedConversation(NamedTuple):
    """A conversation as tokens, with the plans and the bytes of the images that it keeps."""

    named: _NamedConversation
    messages: list[Message]
    chat: EncodedChat
    was_cut: bool
    plans: tuple[TilePlan, ...]
    images: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True)
class _PreparedExample:
    """An example without its pixels; `refused` lacks only the reason, for images that turn out to be unusable."""

    numbers: tuple[int, ...]
    chat: EncodedChat
    num_cut: int
    plans: Sequence[TilePlan]
    images: Sequence[bytes]
    refused: tuple[Refused, ...]
    branch_ids: np.ndarray | None = None

    def measured(self, position: int, index: int) -> MeasuredExample:
        """Returns the size of the example, which is the one with this index at its position."""
        tiles = sum(plan.num_tiles for plan in self.plans)
        branch_tokens = 0 if self.branch_ids is None else int(np.count_nonzero(self.branch_ids))
        return MeasuredExample(position, len(self.chat.tokens), tiles, branch_tokens, len(self.numbers), index)


def _alone(conversation: _EncodedConversation) -> _PreparedExample:
    """Returns the example of one conversation."""
    return _together([conversation], conversation.chat)


def _together(members: Sequence[_EncodedConversation], chat: EncodedChat) -> _PreparedExample:
    """Returns the example of several conversations about the same images, with these tokens."""
    return _PreparedExample(
        tuple(member.named.number for member in members),
        chat,
        sum(member.was_cut for member in members),
        members[0].plans,
        members[0].images,
        tuple(member.named.refused for member in members),
    )


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
