"""A trained model as something to ask: images and questions in, answers out.

import alignvlm_jax
reader = alignvlm_jax.load("runs/demo/checkpoint")
print(reader.ask("page.png", "What is the total?"))
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
from jax.sharding import Mesh

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.data import images
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.resampling import num_visual_tokens, resample_images
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.generate import Generator, Prompt
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params, token_grid
from alignvlm_jax.training import checkpoint as checkpoints

ImageSource = str | os.PathLike | bytes | PIL.Image.Image


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
        self.generator = Generator(
            config, params, end_ids=tokenizer.end_ids, pad_id=tokenizer.pad_id, batch_size=batch_size, mesh=mesh
        )

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
        image = _open(image)
        plan = plan_tiles(*image.size, self.tiling)
        tiles, valid_hw = cut_tiles(image, plan, self.tiling.tile_size)
        grid = token_grid(self.config)
        num_visual, resampling = num_visual_tokens(plan, self.tiling, grid), resample_images([plan], self.tiling, grid)
        prompts = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = self.tokenizer.encode_prompt([{"role": "user", "content": content}], [num_visual])
            limit = self.config.language.max_position_embeddings
            if len(chat.tokens) >= limit:
                raise UserError(
                    f"image and question take {len(chat.tokens)} tokens ({num_visual} of them the image's), "
                    f"the model has room for {limit}: shorten the question"
                )
            prompts.append(Prompt(chat.tokens, chat.visual_index, tiles, valid_hw, resampling))
        return prompts

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
    # Imported here: what reads other formats is built on top of this room.
    from alignvlm_jax.interop.import_pytorch import is_alignvlm_folder, read_alignvlm

    folder = NANO_MODEL if os.fspath(checkpoint) == "nano" and not os.path.exists("nano") else checkpoint
    if is_alignvlm_folder(folder):
        found = read_alignvlm(folder, dtype=dtype or "float32", mesh=mesh)
        config, params, tokenizer = found.config, found.params, found.tokenizer
    else:
        source = checkpoints.ParameterReader(folder)
        config, tokenizer = source.config, ChatTokenizer.from_folder(source.tokenizer_folder)
        narrow = source.dtypes["language/embedding"] == hardware.resolve(config.model.language).dtype == "bfloat16"
        params = checkpoints.restore_params(folder, mesh, dtype=dtype or ("bfloat16" if narrow else "float32"))
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
