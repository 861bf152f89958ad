"""A trained model as something to ask: images and questions in, answers out.

import alignvlm_jax
reader = alignvlm_jax.load("runs/demo/checkpoint")
print(reader.ask("page.png", "What is the total?"))
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.weights import ParameterReader, restore_params
from alignvlm_jax.data import images
from alignvlm_jax.data.chat import ChatTokenizer, Message
from alignvlm_jax.data.resampling import num_visual_tokens, resample_images
from alignvlm_jax.data.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import views
from alignvlm_jax.inference.generate import Generator, Prompt
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params, token_grid

ImageSource = str | os.PathLike | bytes | PIL.Image.Image


class CutImage(NamedTuple):
    """An image as the model sees it: M tiles, side S, and the same in each further view of K."""

    plan: TilePlan
    tiles: UInt8[np.ndarray, "M S S 3"]
    valid_hw: Int[np.ndarray, "M 2"]
    moved: UInt8[np.ndarray, "K-1 M S S 3"] | None = None


class Reader:
    """A model, its tokenizer and its way of cutting tiles."""

    def __init__(
        self,
        config: AlignVLMConfig,
        params: Params,
        tokenizer: ChatTokenizer,
        tiling: TilingConfig,
        *,
        batch_size: int = 32,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.tiling = tiling
        self.num_views = 1
        self.generator = Generator(
            config, params, end_ids=tokenizer.end_ids, pad_id=tokenizer.pad_id, batch_size=batch_size, mesh=mesh
        )

    def with_feature_noise(self, sigma: float, seed: int = 0) -> "Reader":
        """A reader of the same weights whose connector reads noisy features, to be scored beside this one.

        Args:
          sigma: standard deviation of the Gaussian noise, in the features' own units.
          seed: what noise; of one seed a page always has the same (`models/feature_noise.py`).
        """
        noisy = copy.copy(self)
        noisy.generator = self.generator.with_feature_noise(sigma, seed)
        return noisy

    def with_views(self, number: int) -> "Reader":
        """A reader of the same weights that looks at every image `number` times, moved each time by a part of a patch.

        It reads print better, and takes so many times the work (`inference/views.py`).
        """
        if number < 1:
            raise UserError(f"an image is looked at once or more often, not {number} times")
        other = copy.copy(self)
        other.num_views = number
        return other

    def ask(self, image: ImageSource, question: str, *, max_new_tokens: int = 128) -> str:
        """The model's answer, decoded greedily.

        Args:
          image: a path, the bytes of an image file, or a PIL image.
          question: what you want to know.
          max_new_tokens: where an answer that does not end is cut off.
        """
        return self.ask_batch([image], [question], max_new_tokens=max_new_tokens)[0]

    def ask_batch(
        self, images: Sequence[ImageSource], questions: Sequence[str], *, max_new_tokens: int = 128
    ) -> list[str]:
        """Answers to many questions, one image each; the same as asking one by one, but faster."""
        if len(images) != len(questions):
            raise UserError(f"{len(images)} images for {len(questions)} questions: there must be one for each")
        prompts = [self.prompts(image, [question])[0] for image, question in zip(images, questions, strict=True)]
        return self.answer(prompts, max_new_tokens=max_new_tokens)

    def prompts(self, image: ImageSource, questions: Sequence[str]) -> list[Prompt]:
        """What the model is given for each question about one image, which is cut into tiles once."""
        questions = [check_question(question) for question in questions]
        shown = [self.cut(image)]
        prompts = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompts.append(self.chat_prompt([{"role": "user", "content": content}], shown))
        return prompts

    def cut(self, image: ImageSource) -> CutImage:
        """An image cut into tiles, to be shown in any number of prompts."""
        image = _open(image)
        plan = plan_tiles(*image.size, self.tiling)
        if self.num_views == 1:
            return CutImage(plan, *cut_tiles(image, plan, self.tiling.tile_size))
        offsets = views.offsets(self.num_views, plan, self.config.vision.patch_size).tolist()
        looks = [cut_tiles(views.moved(image, *offset), plan, self.tiling.tile_size) for offset in offsets]
        (tiles, valid_hw), *others = looks
        return CutImage(plan, tiles, valid_hw, np.stack([other for other, _ in others]))

    def chat_prompt(self, messages: Sequence[Message], shown: Sequence[CutImage]) -> Prompt:
        """A conversation up to where the model is to go on, with any number of images.

        Args:
          messages: as `chat.ChatTokenizer` takes them; the i-th {"type": "image"} stands for `shown[i]`.
          shown: images from `cut`.
        """
        plans, grid = [image.plan for image in shown], token_grid(self.config)
        tokens_per_image = [num_visual_tokens(plan, self.tiling, grid) for plan in plans]
        chat = self.tokenizer.encode_prompt(messages, tokens_per_image)
        limit = self.config.language.max_position_embeddings
        if len(chat.tokens) >= limit:
            images = "image" if len(shown) == 1 else f"{len(shown)} images"
            raise UserError(
                f"{images} and question take {len(chat.tokens)} tokens ({sum(tokens_per_image)} of them visual), "
                f"the model has room for {limit}: shorten the question"
            )
        tiles, valid_hw, moved = self._joined(shown)
        return Prompt(chat.tokens, chat.visual_index, tiles, valid_hw, resample_images(plans, self.tiling, grid), moved)

    def _joined(
        self, shown: Sequence[CutImage]
    ) -> tuple[UInt8[np.ndarray, "M S S 3"], Int[np.ndarray, "M 2"], UInt8[np.ndarray, "K-1 M S S 3"] | None]:
        """Tiles, their valid parts and their further views, of all images one after the other."""
        if len(shown) == 1:
            return shown[0].tiles, shown[0].valid_hw, shown[0].moved  # shared by all prompts about it
        side = self.tiling.tile_size
        tiles = np.concatenate([np.zeros((0, side, side, 3), np.uint8), *(image.tiles for image in shown)])
        valid_hw = np.concatenate([np.zeros((0, 2), np.int32), *(image.valid_hw for image in shown)])
        moved = [image.moved for image in shown if image.moved is not None]
        return tiles, valid_hw, np.concatenate(moved, axis=1) if moved else None

    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, on_batch: Callable[[int], Any] | None = None
    ) -> list[str]:
        """The answers to prompts from `prompts`; `on_batch` hears how many more are done."""
        answers = self.generator.generate(prompts, max_new_tokens, on_batch=on_batch)
        return [self.tokenizer.decode(answer).strip() for answer in answers]


def load(
    checkpoint: str | os.PathLike, *, batch_size: int = 32, dtype: str | None = None, mesh: Mesh | None = None
) -> Reader:
    """A trained model, ready to be asked.

    Args:
      checkpoint: the workdir of a training run (its newest step is taken), one of its step folders, a folder that
        `tools/export_pytorch.py` wrote, or "nano" for the trained model that is shipped with the package.
      batch_size: most questions answered at once.
      dtype: of the weights. None keeps bfloat16 weights as they are stored if the model computes in bfloat16, and makes
        all others float32.
      mesh: the devices that the weights and each batch are spread over; None takes the first device alone.
    """
    folder = trained_model(checkpoint)
    if is_alignvlm_folder(folder):
        found = read_alignvlm(folder, dtype=dtype or "float32", mesh=mesh)
        config, params, tokenizer = found.config, found.params, found.tokenizer
    else:
        source = ParameterReader(folder)
        config, tokenizer = source.config, ChatTokenizer.from_folder(source.tokenizer_folder)
        narrow = source.dtypes["language/embedding"] == hardware.resolve(config.model.language).dtype == "bfloat16"
        params = restore_params(folder, mesh, dtype=dtype or ("bfloat16" if narrow else "float32"))
    return Reader(config.model, params, tokenizer, config.data.tiling, batch_size=batch_size, mesh=mesh)


def _open(image: ImageSource) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return images.to_rgb(image, keep_grey=True)
    return images.open_image(image, keep_grey=True)


def check_question(question: str) -> str:
    """The question without spaces at its ends; an empty one is refused."""
    if not question.strip():
        raise UserError("the question is empty: say what you want to know about the image")
    return question.strip()
