"""Prompts: a question about the tiles of images, in the form that the model decodes; and the text of its answer.

Nothing here needs the model or its weights, so a prompt is made before either is loaded.

Axes: M tiles, S tile side, K views, L positions, A positions of the answer.
"""

import copy
import dataclasses
import os
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Int, UInt8

from alignvlm_jax.data.chat import ChatTokenizer, Message
from alignvlm_jax.data.image_sources import ImageSource, open_images, open_single_image
from alignvlm_jax.data.page_scale import page_scale
from alignvlm_jax.data.pdf import pixels_per_point
from alignvlm_jax.data.resampling import Resampling, at_positions, num_visual_tokens, resample_images
from alignvlm_jax.data.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import views
from alignvlm_jax.inference.answers import AnswerText, describe_scale, describe_text

UNTRAINED = "the connector was never trained, so its answers have nothing to do with the page"
_LENGTH_STEP = 64


Batch = dict[str, np.ndarray]


class CutImage(NamedTuple):
    """An image cut into tiles.

    Attributes:
      plan: sizes and places of the tiles.
      tiles: pixels of the tiles, in the first view.
      valid_hw: height and width of the image's part of each tile.
      other_views: pixels of the tiles in all views but the first; None for a single view.
      scale: scale at which the tiles show the image (`data/page_scale.py`).
    """

    plan: TilePlan
    tiles: UInt8[np.ndarray, "M S S 3"]
    valid_hw: Int[np.ndarray, "M 2"]
    other_views: UInt8[np.ndarray, "K-1 M S S 3"] | None = None
    scale: float = 1.0


class TrainingRecord(NamedTuple):
    """Facts about the training of a model's weights.

    Attributes:
      is_connector_trained: False if the connector still has its random initial weights.
      page_scale: scale of the training pages (`data/page_scale.py`); None if unknown.
    """

    is_connector_trained: bool = True
    page_scale: float | None = None


class Geometry(NamedTuple):
    """Sizes of a model that prompts depend on.

    Attributes:
      patch_size: patch side of the vision encoder, in pixels of a tile.
      token_grid: rows and columns of one tile's visual tokens.
      max_positions: number of positions of the decoder.
    """

    patch_size: int
    token_grid: tuple[int, int]
    max_positions: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation up to the model's next turn.

    Attributes:
      tokens: token ids, with placeholders at the positions of visual tokens.
      visual_index: index of the visual token at each position; -1 for text.
      tiles: pixels of the tiles of all images, in the first view. There may be none.
      tile_valid_hw: height and width of the image's part of each tile.
      resampling: sources and weights of each visual token, for the tiling rule anyres_max_9.
      other_views: pixels of the tiles in all views but the first; None for a single view.
      page_scale: smallest scale at which the tiles show an image (`data/page_scale.py`); 1 without images.
    """

    tokens: Int[np.ndarray, " L"]
    visual_index: Int[np.ndarray, " L"]
    tiles: UInt8[np.ndarray, "M S S 3"]
    tile_valid_hw: Int[np.ndarray, "M 2"]
    resampling: Resampling | None = None
    other_views: UInt8[np.ndarray, "K-1 M S S 3"] | None = None
    page_scale: float = 1.0

    @property
    def num_views(self) -> int:
        """Number of views K."""
        return 1 if self.other_views is None else 1 + len(self.other_views)

    def views(self) -> "list[Prompt]":
        """Returns one prompt per view, each with a single view of the images."""
        others = () if self.other_views is None else self.other_views
        return [dataclasses.replace(self, tiles=tiles, other_views=None) for tiles in (self.tiles, *others)]


class PromptMaker:
    """Makes prompts for a model, and texts of its answers.

    Attributes:
      geometry: sizes of the model.
      tokenizer: tokenizer of conversations.
      tiling: settings of the tiles.
      training: what is known about the training of the weights, for warnings about answers.
      num_views: number of views of each image.
    """

    def __init__(
        self, geometry: Geometry, tokenizer: ChatTokenizer, tiling: TilingConfig, training: TrainingRecord | None = None
    ):
        self.geometry = geometry
        self.tokenizer = tokenizer
        self.tiling = tiling
        self.training = training or TrainingRecord()
        self.num_views = 1

    def with_views(self, number: int) -> Self:
        """Returns a copy that shows every image `number` times, shifted by parts of a patch.

        The model then reads text more accurately, at `number` times the work (see `inference/views.py`).

        Raises:
          UserError: if `number` is less than 1.
        """
        if number < 1:
            raise UserError(f"the number of views must be at least 1, got {number}")
        other = copy.copy(self)
        other.num_views = number
        return other

    def prompts(self, image: ImageSource | Sequence[ImageSource], questions: Sequence[str]) -> list[Prompt]:
        """Returns a prompt for each question about one image, or about several. Each image is cut into tiles once."""
        # All questions are checked before the first image is decoded.
        questions = [check_question(question) for question in questions]
        sources = image if isinstance(image, list | tuple) else [image]
        cut_images = [image for source in sources for image in self.cut_all(source)]
        return [self._question_prompt(question, cut_images) for question in questions]

    def prompts_of_pairs(self, images: Sequence[ImageSource], questions: Sequence[str]) -> list[Prompt]:
        """Returns a prompt for each pair of an image and a question. An image that occurs again is cut only once."""
        cut_images: dict[Hashable, list[CutImage]] = {}
        prompts = []
        for image, question in zip(images, questions, strict=True):
            question, key = check_question(question), _identity(image)
            if key not in cut_images:
                cut_images[key] = self.cut_all(image)
            prompts.append(self._question_prompt(question, cut_images[key]))
        return prompts

    def _question_prompt(self, question: str, cut_images: Sequence[CutImage]) -> Prompt:
        """Returns the prompt of a question that follows its images."""
        content = [*[{"type": "image"}] * len(cut_images), {"type": "text", "text": question}]
        return self.chat_prompt([{"role": "user", "content": content}], cut_images)

    def cut_all(self, source: ImageSource) -> list[CutImage]:
        """Cuts an image, or each page of a PDF (`data/image_sources.py`), as `cut` does."""
        return [self.cut(image) for image in open_images(source, keep_gray=True)]

    def cut(self, image: ImageSource) -> CutImage:
        """Cuts an image into tiles, for use in any number of prompts.

        Raises:
          UserError: if the image cannot be read, or is a PDF of several pages.
        """
        image = open_single_image(image, keep_gray=True)
        plan = plan_tiles(*image.size, self.tiling)
        # A page of a PDF has no pixels of its own. It counts as one of 72 dots per inch.
        scale = min(1.0, page_scale(plan) * pixels_per_point(image))
        if self.num_views == 1:
            return CutImage(plan, *cut_tiles(image, plan, self.tiling.tile_size), scale=scale)
        offsets = views.offsets(self.num_views, plan, self.geometry.patch_size).tolist()
        tiles_per_view = [cut_tiles(views.shift(image, *offset), plan, self.tiling.tile_size) for offset in offsets]
        # Only the content is shifted, not the frame, so the valid parts are the same in all views.
        (tiles, valid_hw), *others = tiles_per_view
        return CutImage(plan, tiles, valid_hw, np.stack([other for other, _ in others]), scale)

    def chat_prompt(self, messages: Sequence[Message], cut_images: Sequence[CutImage]) -> Prompt:
        """Returns the prompt for the model's next turn in a conversation, with any number of images.

        Args:
          messages: messages as for `chat.ChatTokenizer`; the i-th {"type": "image"} stands for `cut_images[i]`.
          cut_images: images from `cut`.

        Raises:
          UserError: if the conversation is too long for the model.
        """
        # Encode the text, with a placeholder for each visual token.
        plans, grid = [image.plan for image in cut_images], self.geometry.token_grid
        tokens_per_image = [num_visual_tokens(plan, self.tiling, grid) for plan in plans]
        chat = self.tokenizer.encode_prompt(messages, tokens_per_image)
        limit = self.geometry.max_positions
        if len(chat.tokens) >= limit:
            images = "image" if len(cut_images) == 1 else f"{len(cut_images)} images"
            raise UserError(
                f"{images} and question take {len(chat.tokens)} tokens ({sum(tokens_per_image)} of them visual), but "
                f"the model has room for {limit}. Shorten the question"
            )
        tiles, valid_hw, other_views = self._concatenate(cut_images)
        resampling = resample_images(plans, self.tiling, grid)
        scale = min((image.scale for image in cut_images), default=1.0)
        return Prompt(chat.tokens, chat.visual_index, tiles, valid_hw, resampling, other_views, scale)

    def _concatenate(
        self, cut_images: Sequence[CutImage]
    ) -> tuple[UInt8[np.ndarray, "M S S 3"], Int[np.ndarray, "M 2"], UInt8[np.ndarray, "K-1 M S S 3"] | None]:
        """Returns the tiles of all images, their valid parts and their other views."""
        # A single image is not copied: all prompts about it share its tiles.
        if len(cut_images) == 1:
            return cut_images[0].tiles, cut_images[0].valid_hw, cut_images[0].other_views
        # The empty arrays make this work without any images.
        side = self.tiling.tile_size
        tiles = np.concatenate([np.zeros((0, side, side, 3), np.uint8), *(image.tiles for image in cut_images)])
        valid_hw = np.concatenate([np.zeros((0, 2), np.int32), *(image.valid_hw for image in cut_images)])
        other_views = [image.other_views for image in cut_images if image.other_views is not None]
        return tiles, valid_hw, np.concatenate(other_views, axis=1) if other_views else None

    def answer_text(self, prompt: Prompt, answer: Int[np.ndarray, " A"], max_new_tokens: int) -> AnswerText:
        """Returns the text of generated tokens, with warnings about it."""
        text = self.tokenizer.decode(answer).strip()
        warnings = {} if self.training.is_connector_trained else dict(untrained=UNTRAINED)
        warnings |= describe_scale(prompt.page_scale, self.training.page_scale)
        return AnswerText(text, warnings | describe_text(text, num_tokens=len(answer), max_new_tokens=max_new_tokens))


def check_question(question: str) -> str:
    """Returns the question without spaces at its ends.

    Raises:
      UserError: if the question is empty or not UTF-8.
    """
    # Where Python's locale is ASCII (`LC_ALL=C`), arguments hold the bytes of other characters as half surrogate pairs.
    try:
        question = question.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"the question is not valid UTF-8: {question[:40]!r}. Type it in a UTF-8 terminal") from error
    if not question.strip():
        raise UserError("the question is empty; ask something about the image")
    return question.strip()


def first_answer(ids: Int[np.ndarray, " A"], end_ids: Sequence[int]) -> Int[np.ndarray, " a"]:
    """Returns the decoded ids up to the first that ends an answer."""
    ends = np.flatnonzero(np.isin(ids, end_ids))
    return ids[: ends[0]] if len(ends) else ids


def pad_prompts(
    prompts: Sequence[Prompt],
    *,
    rows: int,
    tile_size: int,
    pad_id: int,
    length: int | None = None,
    num_tiles: int | None = None,
) -> Batch:
    """Returns a batch with one prompt per row. Rows beyond the prompts are padding.

    before: tokens of lengths 5 and 7, rows=4
    after:  tokens [4, 64], segment_ids 1 at the first 5 and 7 positions of rows 0 and 1, else 0

    Args:
      prompts: the prompts.
      rows: number of rows.
      tile_size: tile side S.
      pad_id: token that pads a row.
      length: length of a row; by default, the longest prompt's length, rounded up.
      num_tiles: tiles of a row, at least one; by default, a power of two.
    """
    if length is None:
        longest = max(len(prompt.tokens) for prompt in prompts)
        length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    if num_tiles is None:
        # At least one tile, because gathering visual tokens from an empty array fails.
        num_tiles = power_of_two(max(1, *(len(prompt.tiles) for prompt in prompts)))
    batch = {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "visual_index": np.full((rows, length), -1, np.int32),
        "tiles": np.zeros((rows, num_tiles, tile_size, tile_size, 3), np.uint8),
        "tile_valid_hw": np.zeros((rows, num_tiles, 2), np.int32),
    }
    # Copy each prompt to the start of its row.
    for row, prompt in enumerate(prompts):
        batch["tokens"][row, : len(prompt.tokens)] = prompt.tokens
        batch["segment_ids"][row, : len(prompt.tokens)] = 1
        batch["visual_index"][row, : len(prompt.tokens)] = prompt.visual_index
        batch["tiles"][row, : len(prompt.tiles)] = prompt.tiles
        batch["tile_valid_hw"][row, : len(prompt.tiles)] = prompt.tile_valid_hw
    # With joined tiles (anyres_max_9), each visual token is a weighted sum of up to four tokens of the tiles.
    if prompts[0].resampling is not None:
        batch["visual_sources"] = np.zeros((rows, length, 4), np.int32)
        batch["visual_weights"] = np.zeros((rows, length, 4), np.float32)
        for row, prompt in enumerate(prompts):
            sources, weights = at_positions(prompt.visual_index, prompt.resampling)
            batch["visual_sources"][row, : len(sources)] = sources
            batch["visual_weights"][row, : len(weights)] = weights
    return batch


def _identity(image: ImageSource) -> Hashable:
    """Returns a value that is equal for the same path, the same bytes and the same image object."""
    return os.fspath(image) if isinstance(image, str | bytes | os.PathLike) else id(image)


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not less than the number."""
    return 1 << max(0, number - 1).bit_length()
