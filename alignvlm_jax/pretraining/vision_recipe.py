"""Trains the nano encoder: a transformer with SigLIP's layout that learns to read characters.

Axes: B pages, M tiles per page, S tile side, N patches per tile, d encoder width, C classes (characters and "none").

There are two objectives. Both train a linear head that is discarded afterwards:

  "patches"        predicts the character under each patch, as the renderer placed it.
  "transcription"  predicts the page's characters in raster order with CTC, without their positions. Connectors are
                   compared on such an encoder, because labels per patch would supervise the output space of ALIGN.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from alignvlm_jax.data.edit_distance import edit_distance
from alignvlm_jax.data.synthetic import draw_document
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.interop.huggingface import save_vision_folder
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.layers import Dense
from alignvlm_jax.models.vision import VisionConfig, VisionEncoder, normalize_tiles
from alignvlm_jax.pretraining.patches import CHARACTERS, patch_classes, reading_order
from alignvlm_jax.pretraining.training import PretrainConfig, pretrain

NANO_VISION = VisionConfig(
    image_size=80, patch_size=8, hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4
)
NANO_TILING = TilingConfig(tile_size=80, max_tiles=4, thumbnail=False)
TILES_PER_PAGE = 2  # the same for all pages of the synthetic corpus
MAX_CHARACTERS = 96

OBJECTIVES = ("patches", "transcription")
_NUM_CLASSES = len(CHARACTERS) + 1


class CharacterClassifier(nn.Module):
    """Encoder with a linear head that predicts the character in each patch."""

    config: VisionConfig

    @nn.compact
    def __call__(self, tiles, tile_valid_hw):
        """Returns the logits of the character in each patch, [B, M, N, C]."""
        pixels = normalize_tiles(tiles, tile_valid_hw).reshape(-1, *tiles.shape[2:])
        features = VisionEncoder(self.config, name="vision")(pixels)
        logits = Dense(_NUM_CLASSES, ("embed", "vocab"), name="head")(features)
        return logits.reshape(*tiles.shape[:2], -1, _NUM_CLASSES)


def make_batches(config: PretrainConfig, split: str = "train") -> grain.MapDataset:
    """Returns batches of pages, drawn on access; element i is the batch of step i."""

    def draw(index: int) -> dict[str, np.ndarray]:
        document = draw_document(config.seed, split, index)
        plan = plan_tiles(*document.image.size, NANO_TILING)
        tiles, valid_hw = cut_tiles(document.image, plan, NANO_TILING.tile_size)
        classes = patch_classes(document, plan, NANO_TILING.tile_size, NANO_VISION.patch_size)
        characters = reading_order(classes)[:MAX_CHARACTERS]
        padded = np.zeros(MAX_CHARACTERS, np.int32)
        padded[: len(characters)] = characters
        return {"tiles": tiles, "tile_valid_hw": valid_hw, "classes": classes, "characters": padded}

    pages = grain.MapDataset.range(config.steps * config.batch_size)
    return pages.map(draw).batch(config.batch_size, drop_remainder=True)


def patch_loss(logits, batch):
    """Returns the mean cross-entropy over patches, and the accuracy on characters and on blank patches."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["classes"])
    right = jnp.argmax(logits, -1) == batch["classes"]
    printed = batch["classes"] > 0
    return jnp.mean(losses), {
        "character_accuracy": jnp.sum(right & printed) / jnp.sum(printed),
        "blank_accuracy": jnp.sum(right & ~printed) / jnp.sum(~printed),
    }


def transcription_loss(logits, batch):
    """Returns the CTC loss per character over all patches of a page in raster order.

    The metric `named` is the number of patches classified as a character, per printed character.
    """
    # One sequence per page: the patches of all tiles, in raster order. CTC's blank is class 0.
    logits = logits.reshape(logits.shape[0], -1, logits.shape[-1])
    characters = batch["characters"]
    losses = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), characters, characters == 0)
    count = jnp.sum(characters > 0, axis=-1)
    return jnp.mean(losses / count), {"named": jnp.mean(jnp.sum(jnp.argmax(logits, -1) > 0, -1) / count)}


def best_path(logits: Float[Array, "B M N C"]) -> list[str]:
    """Returns CTC's best path of each page: the most likely class of each patch, with runs merged, without blanks."""
    classes = np.asarray(jnp.argmax(logits, -1)).reshape(logits.shape[0], -1)
    # A patch that repeats its predecessor's class belongs to the same character (CTC).
    kept = (np.diff(classes, axis=1, prepend=-1) != 0) & (classes > 0)
    return ["".join(CHARACTERS[c - 1] for c in page[keep]) for page, keep in zip(classes, kept, strict=True)]


def character_error_rate(predicted: Sequence[str], batch: Mapping[str, np.ndarray]) -> float:
    """Returns the number of edits that turn the predictions into the printed text, per printed character."""
    printed = ["".join(CHARACTERS[c - 1] for c in page if c) for page in batch["characters"]]
    edits = sum(edit_distance(*pair) for pair in zip(predicted, printed, strict=True))
    return edits / sum(map(len, printed))


@ordinary_modes()
def make_vision_backbone(
    out: str | Path, workdir: str | Path, config: PretrainConfig, objective: str = "patches"
) -> dict[str, float]:
    """Trains the encoder, writes it as a Hugging Face folder, and returns the metrics on validation pages."""
    model = CharacterClassifier(NANO_VISION)
    batches = make_batches(config)
    example = jax.tree.map(jnp.asarray, batches[0])
    params = nn.unbox(model.init(jax.random.key(config.seed), example["tiles"], example["tile_valid_hw"])["params"])
    loss = {"patches": patch_loss, "transcription": transcription_loss}[objective]

    def loss_fn(params, batch):
        return loss(model.apply({"params": params}, batch["tiles"], batch["tile_valid_hw"]), batch)

    params = pretrain(f"vision ({objective})", config, params, loss_fn, batches, workdir)
    save_vision_folder(out, NANO_VISION, params["vision"])

    validation = make_batches(
        dataclasses.replace(config, steps=config.validation_pages // config.batch_size), split="validation"
    )
    score = jax.jit(loss_fn)
    scores = [score(params, batch)[1] for batch in validation]
    if objective == "transcription":
        read = jax.jit(lambda batch: model.apply({"params": params}, batch["tiles"], batch["tile_valid_hw"]))
        for metrics, batch in zip(scores, validation, strict=True):
            metrics["character_error_rate"] = character_error_rate(best_path(read(batch)), batch)
    return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
