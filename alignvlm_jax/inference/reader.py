"""A trained model that answers questions about images.

import alignvlm_jax
reader = alignvlm_jax.load("runs/demo/checkpoint")
print(reader.ask("page.png", "What is the total?"))
"""

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.connector_training import is_connector_trained
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.weights import ParameterReader, read_page_scale, restore_params
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import prepared
from alignvlm_jax.inference.answers import AnswerText
from alignvlm_jax.inference.chat_prompts import conversation_prompt
from alignvlm_jax.inference.generate import Generator
from alignvlm_jax.inference.prompts import (
    UNTRAINED,
    Geometry,
    ImageSource,
    Prompt,
    PromptMaker,
    TrainingRecord,
    first_answer,
)
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.locations import source_location
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params, token_grid


class Reader(PromptMaker):
    """A model with its tokenizer and its tiling.

    Attributes:
      config: configuration of the model.
      generator: decoder of prompts, with the model's parameters.
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
        geometry = Geometry(config.vision.patch_size, token_grid(config), config.language.max_position_embeddings)
        super().__init__(geometry, tokenizer, tiling, training)
        self.config = config
        self.notes = notes
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

    def ask(
        self, image: ImageSource | Sequence[ImageSource], question: str, *, max_new_tokens: int = 128
    ) -> AnswerText:
        """Answers a question about an image by greedy decoding.

        Args:
          image: path or bytes of an image file or PDF, a PIL image, a numpy array or a data URL; or a list of them
            (`data/image_sources.py`).
          question: question about the image.
          max_new_tokens: maximum length of the answer.

        Returns:
          The answer, without whitespace at its ends. It is a string whose `warnings` say why it may be wrong, by kind
          (`inference/answers.py`).
        """
        return self.ask_many(image, [question], max_new_tokens=max_new_tokens)[0]

    @ordinary_modes()
    def ask_and_store(
        self, image: ImageSource | Sequence[ImageSource], question: str, *, max_new_tokens: int, entry: Path
    ) -> AnswerText:
        """Answers as `ask` does, and stores the program and the weights for later commands (`inference/prepared.py`).

        Args:
          image: image as for `ask`.
          question: question about the image.
          max_new_tokens: maximum length of the answer.
          entry: folder for the program and the weights of this small model.
        """
        prompt = self.prompts(image, [question])[0]
        batch = prepared.batch_of(prompt, self.tiling.tile_size, self.tokenizer.pad_id)
        program, arrays = self.generator.compile_program(batch, max_new_tokens, prompt.num_views)
        answer = first_answer(np.asarray(program(arrays, batch))[0], self.tokenizer.end_ids)
        arrays = [np.asarray(array) for array in arrays]
        facts = prepared.Facts(self.geometry, self.tiling, self.training, self.notes, arrays)
        prepared.store(entry, facts, program, batch, max_new_tokens)
        return self.answer_text(prompt, answer, max_new_tokens)

    def ask_many(
        self, image: ImageSource | Sequence[ImageSource], questions: Sequence[str], *, max_new_tokens: int = 128
    ) -> list[AnswerText]:
        """Answers many questions about one page.

        Gives the same answers as single calls of `ask`, but much faster: the image is encoded once, and the questions
        share the decoder's cache of it.

        Args:
          image: image as for `ask`; or a list of images, all of which every question is about.
          questions: questions about the image.
          max_new_tokens: maximum length of each answer.

        Returns:
          The answers, in the order of the questions.
        """
        return self.answer(self.prompts(image, questions), max_new_tokens=max_new_tokens)

    def ask_batch(
        self, images: Sequence[ImageSource], questions: Sequence[str], *, max_new_tokens: int = 128
    ) -> list[AnswerText]:
        """Answers many questions, each about one image.

        Gives the same answers as single calls of `ask`, but faster. An image that occurs several times (the same path,
        bytes or object) is read and cut once, and the model encodes equal images once.

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
        prompts = self.prompts_of_pairs(images, questions)
        return self.answer(prompts, max_new_tokens=max_new_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 128,
        allow_urls: bool = False,
    ) -> AnswerText:
        """Answers the last message of a conversation by greedy decoding.

        Args:
          messages: messages with any number of images, in the shape of OpenAI or of transformers
            (`inference/chat_messages.py`).
          images: images of the parts that are only {"type": "image"}, in order.
          max_new_tokens: maximum length of the answer.
          allow_urls: whether images are fetched from http(s) URLs.

        Raises:
          UserError: if a message is in no such shape, or an image cannot be read.
        """
        prompt = conversation_prompt(self, messages, images, allow_urls=allow_urls)
        return self.answer([prompt], max_new_tokens=max_new_tokens)[0]

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
    folder = trained_model(source_location(checkpoint))
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
        print(f"warning: {UNTRAINED}", file=sys.stderr)
