"""A trained model that answers questions about images.

    import alignvlm_jax
    reader = alignvlm_jax.load("runs/demo/checkpoint")
    print(reader.ask("page.png", "What is the total?"))

Axes: M tiles, S tile side, K views.
"""

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.connector_training import is_connector_trained
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.weights import ParameterReader, read_page_scale, restore_params
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data import images
from alignvlm_jax.data.chat import ChatTokenizer, Message
from alignvlm_jax.data.page_scale import page_scale
from alignvlm_jax.data.resampling import num_visual_tokens, resample_images
from alignvlm_jax.data.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import views
from alignvlm_jax.inference.answers import AnswerText, describe_scale, describe_text
from alignvlm_jax.inference.generate import Generator, Prompt
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.locations import location
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params, token_grid

_UNTRAINED = "the connector was never trained, so its answers have nothing to do with the page"

ImageSource = str | os.PathLike | bytes | PIL.Image.Image


class CutImage(NamedTuple):
    """An image cut into tiles.

    Attributes:
      plan: sizes and places of the tiles.
      tiles: pixels of the tiles, in the first view.
      valid_hw: height and width of the image's part of each tile.
      other_views: pixels of the tiles in all views but the first; None for a single view.
    """

    plan: TilePlan
    tiles: UInt8[np.ndarray, "M S S 3"]
    valid_hw: Int[np.ndarray, "M 2"]
    other_views: UInt8[np.ndarray, "K-1 M S S 3"] | None = None


class TrainingRecord(NamedTuple):
    """Facts about the training of a model's weights.

    Attributes:
      is_connector_trained: False if the connector still has its random initial weights.
      page_scale: scale of the training pages (`data/page_scale.py`); None if unknown.
    """

    is_connector_trained: bool = True
    page_scale: float | None = None


class Reader:
    """A model with its tokenizer and its tiling.

    Attributes:
      config: configuration of the model.
      tokenizer: tokenizer of conversations.
      tiling: settings of the tiles.
      num_views: number of views of each image.
      generator: decoder of prompts, with the model's parameters.
      training: what is known about the training of the weights, for warnings about answers.
      notes: sentences for the user about files of the checkpoint that were not read.
    """

    def __init__(
        self,
        config: AlignVLMConfig,
        params: Params,
        tokenizer: ChatTokenizer,
        tiling: TilingConfig,
        *,
        batch_size: int = 32,
        mesh: Mesh | None = None,
        training: TrainingRecord | None = None,
        notes: tuple[str, ...] = (),
    ):
        self.config = config
        self.training = training or TrainingRecord()
        self.notes = notes
        self.tokenizer = tokenizer
        self.tiling = tiling
        self.num_views = 1
        self.generator = Generator(
            config, params, end_ids=tokenizer.end_ids, pad_id=tokenizer.pad_id, batch_size=batch_size, mesh=mesh
        )

    def with_feature_noise(self, sigma: float, seed: int = 0) -> "Reader":
        """Returns a reader with the same weights whose connector reads noisy features.

        Args:
          sigma: standard deviation of the Gaussian noise, in units of the features.
          seed: seed of the noise. With the same seed, a page always gets the same noise (`models/feature_noise.py`).
        """
        noisy = copy.copy(self)
        noisy.generator = self.generator.with_feature_noise(sigma, seed)
        return noisy

    def with_views(self, number: int) -> "Reader":
        """Returns a reader with the same weights that sees every image `number` times, shifted by parts of a patch.

        It reads text more accurately, at `number` times the work (see `inference/views.py`).

        Raises:
          UserError: if `number` is less than 1.
        """
        if number < 1:
            raise UserError(f"the number of views must be at least 1, got {number}")
        other = copy.copy(self)
        other.num_views = number
        return other

    def ask(self, image: ImageSource, question: str, *, max_new_tokens: int = 128) -> AnswerText:
        """Answers a question about an image by greedy decoding.

        Args:
          image: path or bytes of an image file, or a PIL image.
          question: question about the image.
          max_new_tokens: maximum length of the answer.

        Returns:
          The answer, without whitespace at its ends. It is a string whose `warnings` say why it may be wrong, by kind
          (`inference/answers.py`).
        """
        return self.ask_batch([image], [question], max_new_tokens=max_new_tokens)[0]

    def ask_batch(
        self, images: Sequence[ImageSource], questions: Sequence[str], *, max_new_tokens: int = 128
    ) -> list[AnswerText]:
        """Answers many questions, each about one image.

        Gives the same answers as single calls of `ask`, but faster.

        Args:
          images: one image per question, as for `ask`.
          questions: one question per image.
          max_new_tokens: maximum length of each answer.

        Returns:
          The answers, in the order of the questions.
        """
        if len(images) != len(questions):
            raise UserError(f"expected one image per question, got {len(images)} images and {len(questions)} questions")
        # Build all prompts first, so that batches can have prompts of similar length.
        prompts = [self.prompts(image, [question])[0] for image, question in zip(images, questions, strict=True)]
        return self.answer(prompts, max_new_tokens=max_new_tokens)

    def prompts(self, image: ImageSource, questions: Sequence[str]) -> list[Prompt]:
        """Returns a prompt for each question about one image. The image is cut into tiles only once."""
        questions = [check_question(question) for question in questions]
        cut_images = [self.cut(image)]
        prompts = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompts.append(self.chat_prompt([{"role": "user", "content": content}], cut_images))
        return prompts

    def cut(self, image: ImageSource) -> CutImage:
        """Cuts an image into tiles, for use in any number of prompts."""
        image = _open(image)
        plan = plan_tiles(*image.size, self.tiling)
        if self.num_views == 1:
            return CutImage(plan, *cut_tiles(image, plan, self.tiling.tile_size))
        offsets = views.offsets(self.num_views, plan, self.config.vision.patch_size).tolist()
        tiles_per_view = [cut_tiles(views.shift(image, *offset), plan, self.tiling.tile_size) for offset in offsets]
        # Only the content is shifted, not the frame, so the valid parts are the same in all views.
        (tiles, valid_hw), *others = tiles_per_view
        return CutImage(plan, tiles, valid_hw, np.stack([other for other, _ in others]))

    def chat_prompt(self, messages: Sequence[Message], cut_images: Sequence[CutImage]) -> Prompt:
        """Returns the prompt for the model's next turn in a conversation, with any number of images.

        Args:
          messages: messages as for `chat.ChatTokenizer`; the i-th {"type": "image"} stands for `cut_images[i]`.
          cut_images: images from `cut`.

        Raises:
          UserError: if the conversation is too long for the model.
        """
        # Encode the text, with a placeholder for each visual token.
        plans, grid = [image.plan for image in cut_images], token_grid(self.config)
        tokens_per_image = [num_visual_tokens(plan, self.tiling, grid) for plan in plans]
        chat = self.tokenizer.encode_prompt(messages, tokens_per_image)
        limit = self.config.language.max_position_embeddings
        if len(chat.tokens) >= limit:
            images = "image" if len(cut_images) == 1 else f"{len(cut_images)} images"
            raise UserError(
                f"{images} and question take {len(chat.tokens)} tokens ({sum(tokens_per_image)} of them visual), but "
                f"the model has room for {limit}. Shorten the question"
            )
        tiles, valid_hw, other_views = self._concatenate(cut_images)
        resampling = resample_images(plans, self.tiling, grid)
        scale = min(map(page_scale, plans), default=1.0)
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

    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, on_batch: Callable[[int], Any] | None = None
    ) -> list[AnswerText]:
        """Answers prompts.

        Args:
          prompts: prompts from `prompts` or `chat_prompt`.
          max_new_tokens: maximum length of each answer.
          on_batch: function called after each batch with the number of prompts it answered.

        Returns:
          The answers, in the order of the prompts, without whitespace at their ends.
        """
        answers = self.generator.generate(prompts, max_new_tokens, on_batch=on_batch)
        return [
            self.answer_text(prompt, answer, max_new_tokens) for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def answer_text(self, prompt: Prompt, answer: Int[np.ndarray, " A"], max_new_tokens: int) -> AnswerText:
        """Returns the text of generated tokens, with warnings about it."""
        text = self.tokenizer.decode(answer).strip()
        warnings = {} if self.training.is_connector_trained else dict(untrained=_UNTRAINED)
        warnings |= describe_scale(prompt.page_scale, self.training.page_scale)
        return AnswerText(text, warnings | describe_text(text, num_tokens=len(answer), max_new_tokens=max_new_tokens))


@ordinary_modes()
def load(
    checkpoint: str | os.PathLike, *, batch_size: int = 32, dtype: str | None = None, mesh: Mesh | None = None
) -> Reader:
    """Loads a trained model.

    Args:
      checkpoint: folder of a training run (its newest step is loaded), one of its step folders, a folder written by
        `alignvlm export`, or "nano" for the trained model in the package.
      batch_size: maximum number of questions answered at once.
      dtype: data type of the weights. By default, weights stored in bfloat16 stay so if the model computes in bfloat16,
        and all others become float32.
      mesh: mesh over which the weights and each batch are distributed. The default is the first device alone.

    Returns:
      A reader for questions about images.

    Raises:
      UserError: if there is no usable checkpoint.
    """
    folder = trained_model(location(checkpoint))
    if is_alignvlm_folder(folder):
        exported = read_alignvlm(folder, dtype=dtype or "float32", mesh=mesh)
        config, params, tokenizer, notes = exported.config, exported.params, exported.tokenizer, exported.notes
        progress, history, scale = dataclasses.asdict(exported.progress), exported.history, exported.page_scale
    else:
        source, notes = ParameterReader(folder), ()
        progress, history, scale = source.meta["progress"], source.history, read_page_scale(folder)
        config, tokenizer = source.config, ChatTokenizer.from_folder(source.tokenizer_folder)
        # A checkpoint stores its weights in one dtype, except for a few of the connector's; the embedding tells which.
        is_bfloat16 = source.dtypes["language/embedding"] == hardware.resolve(config.model.language).dtype == "bfloat16"
        params = restore_params(folder, mesh, dtype=dtype or ("bfloat16" if is_bfloat16 else "float32"))
    return Reader(
        config.model,
        params,
        tokenizer,
        config.data.tiling,
        batch_size=batch_size,
        mesh=mesh,
        training=TrainingRecord(is_connector_trained(history, progress, config_to_dict(config)), scale),
        notes=notes,
    )


def warn_untrained(training: TrainingRecord) -> None:
    """Prints a line on stderr if the connector was never trained."""
    if not training.is_connector_trained:
        print(f"warning: {_UNTRAINED}", file=sys.stderr)


def _open(image: ImageSource) -> PIL.Image.Image:
    """Returns an image in RGB or gray."""
    if isinstance(image, PIL.Image.Image):
        return images.to_rgb(image, keep_gray=True)
    return images.open_image(image, keep_gray=True)


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
