"""A tiny model, and packed batches of random numbers for it in the shapes of the real pipeline.

K microbatches, B bins, L positions, M tiles per bin, N visual tokens per tile.
"""

import jax
import numpy as np

from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.config.stages import LearningRates, MixturePart, StageConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig, tokens_per_tile
from alignvlm_jax.models.connectors import AlignConfig
from tests.tiny_models import tiny_language, tiny_vision

MODEL = AlignVLMConfig(
    vision=tiny_vision(num_layers=2),
    connector=AlignConfig(),
    language=tiny_language(
        48, hidden_size=16, intermediate_size=32, num_heads=2, rope_theta=10000.0, max_position_embeddings=128
    ),
)
LENGTH = 40
TILES = 3


def stage(**changes) -> StageConfig:
    """Returns a stage of twenty steps that trains all parts; `changes` replace its fields."""
    fields = dict(
        name="tiny",
        mixture=(MixturePart("documents"),),
        steps=20,
        global_batch=8,
        learning_rates=LearningRates(vision=3e-3, connector=6e-3, language=3e-3),
        warmup_steps=2,
        optimizer=OptimizerConfig(weight_decay=0.01),
    )
    return StageConfig(**{**fields, **changes})


def random_batch(seed: int, *, microbatches: int = 1, bins: int = 8, model: AlignVLMConfig = MODEL) -> dict:
    """Returns bins of one or two examples each, padded to `LENGTH`.

    An example has one or two tiles, a prompt, and an answer of random length. Only the tokens of answers have weight.
    """
    rng = np.random.default_rng(seed)
    per_tile, side = tokens_per_tile(model), model.vision.image_size
    rows = (microbatches * bins, LENGTH)
    batch = {
        name: np.zeros(rows, np.int32) for name in ("tokens", "targets", "segment_ids", "positions", "visual_index")
    }
    batch["loss_weights"] = np.zeros(rows, np.float32)
    batch["visual_index"] -= 1
    batch["tiles"] = np.zeros((rows[0], TILES, side, side, 3), np.uint8)
    batch["tile_valid_hw"] = np.zeros((rows[0], TILES, 2), np.int32)
    for row in range(rows[0]):
        start = tile = 0
        for segment in range(1, rng.integers(2, 4)):
            visual = per_tile * int(rng.integers(1, 3))
            prompt, answer = int(rng.integers(2, 4)), int(rng.integers(1, 9))
            stop = start + visual + prompt + answer
            if stop > LENGTH or tile * per_tile + visual > TILES * per_tile:
                break
            span = slice(start, stop)
            batch["tokens"][row, span] = rng.integers(1, model.language.vocab_size, stop - start)
            batch["targets"][row, span] = np.append(batch["tokens"][row, start + 1 : stop], 0)
            batch["segment_ids"][row, span] = segment
            batch["positions"][row, span] = np.arange(stop - start)
            batch["visual_index"][row, start : start + visual] = tile * per_tile + np.arange(visual)
            # The position before a token predicts it, so weights start one position before the answer.
            batch["loss_weights"][row, stop - answer - 1 : stop - 1] = 1.0
            for index in range(tile, tile + visual // per_tile):
                height = int(rng.integers(1, side + 1))
                batch["tiles"][row, index, :height] = rng.integers(0, 256, (height, side, 3))
                batch["tile_valid_hw"][row, index] = height, side
            start, tile = stop, tile + visual // per_tile
    return jax.tree.map(lambda field: field.reshape(microbatches, bins, *field.shape[1:]), batch)
