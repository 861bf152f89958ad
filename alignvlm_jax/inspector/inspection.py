"""From a reader and a picture to everything the page shows.

Axes: M tiles, N patches of a tile, A answer tokens.
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
from alignvlm_jax.inference.generate import Prompt
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.inspector import geometry, packing, page
from alignvlm_jax.inspector.attribution import Attribution, attribute
from alignvlm_jax.inspector.words import PatchWords, check_connector, patch_words
from alignvlm_jax.models.alignvlm import token_grid

_MOST_WORDS = 1000
_MOST_SHARES = 64 * 7290
"""Tokens of an answer times patches: beyond this (64 tokens on a nine-tile page) it gets one map as a whole."""


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """What goes into a page.

    words_per_patch: likeliest words kept of each patch; they are what can be searched for.
    attribution: "tokens": which patches each token of the answer leaned on; "answer": the answer as a whole, for which
      one pass back through the decoder a step is enough; "none".
    steps: gradients that stand for the integral.
    max_new_tokens: where an answer that does not end is cut off.
    """

    words_per_patch: int = 32
    attribution: Literal["tokens", "answer", "none"] = "tokens"
    steps: int = 32
    max_new_tokens: int = 128

    def __post_init__(self):
        if not 0 < self.words_per_patch <= _MOST_WORDS:
            raise UserError(f"words per patch: expected 1 to {_MOST_WORDS}, got {self.words_per_patch}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question and what came of it; `attribution` is None where it was not asked for or the answer is empty."""

    question: str
    text: str
    ids: np.ndarray
    attribution: Attribution | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that a page shows, before it is packed.

    left_out: patches that the language model is not shown.
    vocabulary: V, how many words P ranges over.
    """

    name: str
    checkpoint: str
    image: PIL.Image.Image
    tiles: list[geometry.TilePatches]
    layers: list[geometry.Layer]
    left_out: np.ndarray
    words: PatchWords
    vocabulary: int
    answers: list[Answer]
    tokenizer: ChatTokenizer
    config: InspectConfig

    def to_json(self) -> dict:
        """The data of the page; `packing.py` says how numbers are written."""
        words, k = self.words, self.words.ids.shape[-1]
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            "image": {"width": self.image.width, "height": self.image.height, "url": page.picture_url(self.image)},
            "rows": len(self.tiles[0].ys) - 1,
            "columns": len(self.tiles[0].xs) - 1,
            "tiles": [
                {"box": _rounded(tile.box), "xs": _rounded(tile.xs), "ys": _rounded(tile.ys)} for tile in self.tiles
            ],
            "layers": [{"name": layer.name, "tiles": list(layer.tiles)} for layer in self.layers],
            "leftOut": packing.encode(self.left_out, "u1") if self.left_out.any() else None,
            "text": packing.pack_words(
                words.ids.reshape(-1, k),
                words.probabilities.reshape(-1, k),
                words.entropy.reshape(-1),
                vocabulary=self.vocabulary,
                text_of=self.tokenizer.token_text,
            ),
            "questions": [self._question(answer) for answer in self.answers],
        }

    def _question(self, answer: Answer) -> dict:
        found = answer.attribution
        tokens = [{"text": self.tokenizer.token_text(int(token))} for token in answer.ids]
        packed = {"question": answer.question, "answer": answer.text, "tokens": tokens, "maps": None}
        if found is None:
            return packed
        for token, log_prob, blank in zip(tokens, found.log_probs, found.blank_log_probs, strict=True):
            token |= {"logProb": float(log_prob), "blankLogProb": float(blank)}
        whole = found.shares.sum(axis=0, keepdims=True)
        maps = whole if len(found.shares) == 1 else np.concatenate([whole, found.shares])
        return packed | {
            "maps": packing.pack_maps(maps),
            "missing": found.missing,
            "steps": self.config.steps,
        }


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
    """Reads a page, answers questions about it, and finds which patches the answers leaned on.

    Args:
      reader: with a checkpoint whose connector is ALIGN.
      image: a path or a picture.
      questions: any number.
      name: what to call the picture; by default its file's name.
      checkpoint: what to call the model.
      config: what to find out.
      progress: show bars.
    """
    check_connector(reader.config)
    if not isinstance(image, PIL.Image.Image):
        name = name or os.path.basename(os.fspath(image))
        image = images.open_image(image)
    image = images.to_rgb(image)
    plan = plan_tiles(*image.size, reader.tiling)
    tiles, valid_hw = cut_tiles(image, plan, reader.tiling.tile_size)
    variables = reader.generator.variables
    k = config.words_per_patch
    words = patch_words(reader.config, variables, tiles, valid_hw, k=k, progress=progress)

    prompts = reader.prompts(image, questions)
    answers = []
    if prompts:
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
        left_out=geometry.left_out(plan, words.entropy.shape[1], resampling),
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
    (ids,) = reader.generator.generate([prompt], config.max_new_tokens)
    text = reader.tokenizer.decode(ids).strip()
    found = None
    if blank is not None and len(ids):
        width = words.visual.shape[-1]
        found = attribute(
            reader.config,
            reader.generator.variables,
            prompt,
            ids,
            words.visual.reshape(-1, width),
            blank.visual.reshape(-1, width),
            steps=config.steps,
            per_token=config.attribution == "tokens" and len(ids) * words.entropy.size <= _MOST_SHARES,
            progress=progress,
        )
    return Answer(question, text, ids, found)


def _rounded(numbers) -> list[float]:
    return [round(float(number), 3) for number in numbers]


def inspect_to_file(
    checkpoint: str | os.PathLike,
    image: str | os.PathLike | PIL.Image.Image,
    questions: Sequence[str],
    out: str | os.PathLike,
    *,
    name: str | None = None,
    config: InspectConfig = InspectConfig(),
) -> None:
    """`inspect_image` by a checkpoint, and the page written to a file; says how large it is."""
    checkpoint = os.fspath(checkpoint)
    found = inspect_image(load(checkpoint), image, questions, name=name, checkpoint=checkpoint, config=config)
    text = page.render(found.to_json(), title=f"{found.name}, in words")
    page.write(text, out)
    for answer in found.answers:
        print(f"{answer.question}  ->  {answer.text}")
    size, patches = len(text.encode()) / 1e6, found.words.entropy.size
    print(f"{out}: {size:.2f} MB, {len(found.tiles)} tiles, {patches:,} patches; open it in a browser")
