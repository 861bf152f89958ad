"""Sample data for the tests of the inspector: a small reader, and a page of maximum size with random numbers."""

import pathlib

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.tiling import TilingConfig, plan_tiles
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inspector import InspectConfig, Inspection, geometry
from alignvlm_jax.inspector.attribution import Attribution
from alignvlm_jax.inspector.inspection import Answer
from alignvlm_jax.inspector.words import PatchWords
from alignvlm_jax.models.alignvlm import AlignVLMConfig, random_parameters
from alignvlm_jax.models.connectors import AlignConfig
from tests.data.nano_tokenizer import write_chat_folder
from tests.tiny_models import tiny_language, tiny_vision

QUESTION = "What is the total?"


def tiny_reader(folder: pathlib.Path, rule: str = "ovis") -> Reader:
    """Returns a reader with random weights and at most four tiles of 2 x 2 patches (anyres_max_9: 4 x 4).

    The weights are large enough for patches to have different words.
    """
    side = 32 if rule == "anyres_max_9" else 16
    tokenizer = ChatTokenizer.from_folder(write_chat_folder(folder))
    config = AlignVLMConfig(
        vision=tiny_vision(side),
        connector=AlignConfig(vocab_scale_init=8.0),
        language=tiny_language(tokenizer.vocab_size, max_position_embeddings=256),
        newline=rule == "anyres_max_9",
    )

    def draw(rng):
        params = random_parameters(config, rng)
        # With larger weights the decoder is too nonlinear for integrated gradients to converge.
        factors = {"vision": 4, "connector": 4, "language": 1.4}
        return {part: jax.tree.map(lambda leaf, factor=factors[part]: leaf * factor, params[part]) for part in params}

    params = jax.jit(draw)(jax.random.key(0))
    tiling = TilingConfig(rule, tile_size=side, max_tiles=4, thumbnail=rule != "ovis", grid_side=2)
    return Reader(config, params, tokenizer, tiling, batch_size=1)


def noise_page(seed: int, width: int = 16, height: int = 30) -> PIL.Image.Image:
    """Returns an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


class FakeTokenizer:
    """Stands in for a tokenizer of 128256 tokens: invented words, with and without a leading blank and a capital."""

    size = 128256
    syllables = [first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er", "or")]

    def token_text(self, token_id: int) -> str:
        word, number = "", token_id // 4
        while number or not word:
            number, digit = divmod(number, len(self.syllables))
            word += self.syllables[digit]
        return (" " if token_id % 2 else "") + (word.capitalize() if token_id % 4 > 1 else word)


def nine_tiles(*, tokens: int = 12, k: int = 32, seed: int = 0) -> Inspection:
    """Returns the largest possible page: nine tiles and a thumbnail, 729 patches each, k of 128256 words per patch.

    Tokens 4004 to 4007 are four spellings of one word. Two of them occur, on patch 2000 only.
    """
    rng = np.random.default_rng(seed)
    side = 1152
    image = PIL.Image.new("RGB", (side, side), "white")
    draw = PIL.ImageDraw.Draw(image)
    for line in range(60):
        words = " ".join(FakeTokenizer().token_text(int(word)).strip() for word in rng.integers(0, 128256, 12))
        draw.text((40, 30 + line * 18), words, fill="black")
    tiling = TilingConfig("ovis", 384)
    plan = plan_tiles(side, side, tiling)
    assert (plan.num_tiles, plan.thumbnail) == (10, 0)
    patches = geometry.tile_patches(plan, 14, 384)
    total = 10 * 729
    # k probabilities per patch in a geometric series with a random ratio; all are above the floor of the packing.
    ratio = rng.uniform(0.75, 0.85, (total, 1))
    probabilities = ratio ** np.arange(k)
    probabilities *= rng.uniform(0.6, 0.99, (total, 1)) / probabilities.sum(axis=1, keepdims=True)
    ids = rng.integers(8000, FakeTokenizer.size, (total, k))
    ids += np.arange(k) - ids % k  # no word occurs twice in a patch
    ids[2000, :2] = 4005, 4006
    probabilities[2000] = [0.9, *(0.018 * 0.8 ** np.arange(k - 1))]
    entropy = rng.uniform(0.5, 6, total)
    maps = rng.normal(size=(tokens, total)) ** 3 * 1e-2
    maps[:, 2000] += 2
    rise = maps.sum(axis=1)
    answer = Answer(
        QUESTION,
        "".join(FakeTokenizer().token_text(8001 + 4 * token) for token in range(tokens)).strip(),
        8001 + 4 * np.arange(tokens),
        Attribution(np.full(tokens, -0.01), -0.01 - rise, maps),
    )
    return Inspection(
        name="a nine-tile page",
        checkpoint="drawn",
        image=image,
        tiles=patches,
        layers=geometry.layers(plan),
        unused_patches=np.zeros((10, 729), bool),
        words=PatchWords(
            np.zeros((10, 729, 0)), entropy.reshape(10, 729), ids.reshape(10, 729, k), probabilities.reshape(10, 729, k)
        ),
        vocabulary=FakeTokenizer.size,
        answers=[answer],
        tokenizer=FakeTokenizer(),
        config=InspectConfig(words_per_patch=k),
    )
