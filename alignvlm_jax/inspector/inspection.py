"""Inspects an image with a reader and collects everything that the page shows.

Axes: M tiles, N patches per tile, A answer tokens.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import PIL.Image

from alignvlm_jax.data import images
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.resampling import resample_images
from alignvlm_jax.data.tiling import cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.answers import AnswerText, warn_about
from alignvlm_jax.inference.generate import Prompt
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.inspector import geometry, packing, page
from alignvlm_jax.inspector.attribution import Attribution, attribute
from alignvlm_jax.inspector.words import PatchWords, check_connector, patch_words
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import token_grid
from alignvlm_jax.output_files import check_distinct, check_writable

_MAX_WORDS = 1000
# Answer tokens times patches up to which every token gets its own map (64 tokens on a nine-tile page). Above it, there
# is a single map for the whole answer.
_MAX_SHARES = 64 * 7290


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Settings of an inspection.

    Attributes:
      words_per_patch: number of likeliest words kept of each patch. Only these can be searched for.
      attribution: "tokens" attributes each token of the answer to the patches; "answer" attributes the answer as a
        whole, which takes one backward pass through the decoder per step; "none" skips the attribution.
      steps: number of gradients that approximate the integral.
      max_new_tokens: maximum length of an answer.
    """

    words_per_patch: int = 32
    attribution: Literal["tokens", "answer", "none"] = "tokens"
    steps: int = 32
    max_new_tokens: int = 128

    def __post_init__(self):
        if not 0 < self.words_per_patch <= _MAX_WORDS:
            raise UserError(f"words per patch: expected 1 to {_MAX_WORDS}, got {self.words_per_patch}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question and its answer; `attribution` is None if it was not requested or the answer is empty."""

    question: str
    text: AnswerText
    ids: np.ndarray
    attribution: Attribution | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that a page shows, before it is packed.

    Attributes:
      unused_patches: true for patches that the language model does not receive.
      vocabulary: V, the number of words that P ranges over.
    """

    name: str
    checkpoint: str
    image: PIL.Image.Image
    tiles: list[geometry.TilePatches]
    layers: list[geometry.Layer]
    unused_patches: np.ndarray
    words: PatchWords
    vocabulary: int
    answers: list[Answer]
    tokenizer: ChatTokenizer
    config: InspectConfig

    def to_json(self) -> dict:
        """Returns the data of the page; see `packing.py` for the encoding of numbers."""
        words, k = self.words, self.words.ids.shape[-1]
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            "image": {"width": self.image.width, "height": self.image.height, "url": page.image_url(self.image)},
            "rows": len(self.tiles[0].ys) - 1,
            "columns": len(self.tiles[0].xs) - 1,
            "tiles": [
                {"box": _rounded(tile.box), "xs": _rounded(tile.xs), "ys": _rounded(tile.ys)} for tile in self.tiles
            ],
            "layers": [{"name": layer.name, "tiles": list(layer.tiles)} for layer in self.layers],
            "leftOut": packing.encode(self.unused_patches, "u1") if self.unused_patches.any() else None,
            "text": packing.pack_words(
                words.ids.reshape(-1, k),
                words.probabilities.reshape(-1, k),
                words.entropy.reshape(-1),
                vocabulary=self.vocabulary,
                token_text=self.tokenizer.token_text,
            ),
            "questions": [self._question(answer) for answer in self.answers],
        }

    def _question(self, answer: Answer) -> dict:
        """Returns a question, its answer and the attribution of the answer as JSON."""
        attribution = answer.attribution
        tokens = [{"text": self.tokenizer.token_text(int(token))} for token in answer.ids]
        packed = {"question": answer.question, "answer": answer.text, "tokens": tokens, "maps": None}
        if attribution is None:
            return packed
        for token, log_prob, blank in zip(tokens, attribution.log_probs, attribution.blank_log_probs, strict=True):
            token |= {"logProb": float(log_prob), "blankLogProb": float(blank)}
        # Map 0 is the complete answer; maps 1, 2, ... are its tokens.
        total = attribution.shares.sum(axis=0, keepdims=True)
        maps = total if len(attribution.shares) == 1 else np.concatenate([total, attribution.shares])
        return packed | {
            "maps": packing.pack_maps(maps),
            "missing": attribution.missing,
            "steps": self.config.steps,
        }


@ordinary_modes()
def inspect_image(
    reader: Reader,
    image: str | os.PathLike | PIL.Image.Image,
    questions: Sequence[str] = (),
    *,
    name: str | None = None,
    checkpoint: str = "",
    config: InspectConfig = InspectConfig(),
    progress: bool = True,
) -> Inspection:
    """Reads a page, answers questions about it, and attributes the answers to the patches.

    Args:
      reader: reader of a checkpoint whose connector is ALIGN.
      image: path of an image, or the image.
      questions: any number of questions.
      name: name of the image on the page (default: its file name).
      checkpoint: name of the model on the page.
      config: settings.
      progress: show progress bars.

    Raises:
      UserError: if the connector is not ALIGN, the image cannot be read, or a question is empty.
    """
    check_connector(reader.config)
    if not isinstance(image, PIL.Image.Image):
        name = name or os.path.basename(os.fspath(image))
        image = images.open_image(image)
    image = images.to_rgb(image)
    # The words of each patch do not depend on the questions.
    plan = plan_tiles(*image.size, reader.tiling)
    tiles, valid_hw = cut_tiles(image, plan, reader.tiling.tile_size)
    variables = reader.generator.variables
    k = config.words_per_patch
    words = patch_words(reader.config, variables, tiles, valid_hw, k=k, progress=progress)

    # Answer the questions.
    prompts = reader.prompts(image, questions)
    answers = []
    if prompts:
        # The baseline of the attribution: a white page of the same size, cut into the same tiles.
        blank = None
        if config.attribution != "none":
            white = PIL.Image.new("RGB", image.size, "white")
            blank_tiles, _ = cut_tiles(white, plan, reader.tiling.tile_size)
            blank = patch_words(reader.config, variables, blank_tiles, valid_hw, k=k, progress=progress)
        for question, prompt in zip(questions, prompts, strict=True):
            answers.append(_answer(reader, question.strip(), prompt, words, blank, config, progress))
    resampling = resample_images([plan], reader.tiling, token_grid(reader.config))
    return Inspection(
        name=name or "page",
        checkpoint=checkpoint,
        image=image,
        tiles=geometry.tile_patches(plan, reader.config.vision.patch_size, reader.tiling.tile_size),
        layers=geometry.layers(plan),
        unused_patches=geometry.unused_patches(plan, words.entropy.shape[1], resampling),
        words=words,
        vocabulary=variables["params"]["connector"]["w2"].shape[0],
        answers=answers,
        tokenizer=reader.tokenizer,
        config=config,
    )


def _answer(
    reader: Reader,
    question: str,
    prompt: Prompt,
    words: PatchWords,
    blank: PatchWords | None,
    config: InspectConfig,
    progress: bool,
) -> Answer:
    """Generates the answer to a question and attributes it to the patches, unless `blank` is None."""
    (ids,) = reader.generator.generate([prompt], config.max_new_tokens)
    text = reader.answer_text(prompt, ids, config.max_new_tokens)
    attribution = None
    if blank is not None and len(ids):
        width = words.visual.shape[-1]
        attribution = attribute(
            reader.config,
            reader.generator.variables,
            prompt,
            ids,
            words.visual.reshape(-1, width),
            blank.visual.reshape(-1, width),
            steps=config.steps,
            per_token=config.attribution == "tokens" and len(ids) * words.entropy.size <= _MAX_SHARES,
            progress=progress,
        )
    return Answer(question, text, ids, attribution)


def _rounded(numbers) -> list[float]:
    return [round(float(number), 3) for number in numbers]


@ordinary_modes()
def inspect_to_file(
    checkpoint: str | os.PathLike,
    image: str | os.PathLike | PIL.Image.Image,
    questions: Sequence[str],
    out: str | os.PathLike,
    *,
    name: str | None = None,
    config: InspectConfig = InspectConfig(),
) -> None:
    """Loads a checkpoint, inspects an image, writes the page to a file, and prints the answers and the file's size.

    Args:
      checkpoint: name or path of a checkpoint, as for `alignvlm_jax.load`.
      image: path of an image, or the image.
      questions: any number of questions.
      out: path of the HTML file.
      name: name of the image on the page (default: its file name).
      config: settings.

    Raises:
      UserError: see `inspect_image`; also if the file cannot be written.
    """
    checkpoint = os.fspath(checkpoint)
    # Attribution takes minutes on a CPU.
    check_writable(out)
    if isinstance(image, str | os.PathLike):
        check_distinct(image=image, out=out)
    inspection = inspect_image(load(checkpoint), image, questions, name=name, checkpoint=checkpoint, config=config)
    text = page.render(inspection.to_json(), title=f"{inspection.name}, in words")
    page.write(text, out)
    for answer in inspection.answers:
        print(f"{answer.question}  ->  {answer.text}")
        warn_about(answer.text)
    size, patches = len(text.encode()) / 1e6, inspection.words.entropy.size
    print(f"{out}: {size:.2f} MB, {len(inspection.tiles)} tiles, {patches:,} patches; open it in a browser")
