"""The training config of a job: `configs/reproduce.py` with only the changes of the job.

Everything else is the same for all connectors: the backbones, the pages of every step, the number of steps, the
schedule, and the learning rates of encoder and decoder. A bin holds one page, so which pages share a step depends
neither on the number of visual tokens nor on the length of a text.
"""

import dataclasses
from pathlib import Path

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.start import load_config
from alignvlm_jax.models.alignvlm import tokens_per_tile
from alignvlm_jax.models.connectors import connector_names
from alignvlm_jax.reproduce.options import FAIR, Options

# Sizes for tiles of 10 x 10 features, and a decoder of width 128 with 512 words. A connector that reduces the number of
# tokens keeps at least the same share as in the paper, because a nano page has a letter in nearly every patch.
NANO_SIZES = {
    "align": dict(vocab_scale_init=2.0),
    "mlp": {},
    # 64 latents as in Idefics2, here for 100 features (729 there); heads as wide as the decoder's.
    "perceiver": dict(num_latents=64, depth=3, num_heads=4, num_kv_heads=2, head_dim=32),
    # As many visual words as ALIGN has words.
    "ovis": dict(num_words=512),
    "h_reducer": dict(window=4),
    # 8 x 8 tokens from 10 x 10 features (12 x 12 from 27 x 27 in the paper).
    "c_abstractor": dict(num_tokens=64, hidden_size=128),
}

RATE_FACTORS = (1.0, 4.0, 16.0, 64.0)
"""Tuning grid: factors of the connector's learning rates in the recipe.

The recipe has the rates of the demo, whose encoder already separates the letters. Connectors that have to find the
letters in as few steps need higher rates.
"""

TUNING_SHARE = 1 / 3
"""Length of a tuning run as a share of a full run. The schedule is shortened with it."""


def connectors(options: Options) -> tuple[str, ...]:
    """Returns the connectors to compare, in the order of the tables.

    Raises:
      UserError: if a connector does not exist.
    """
    for name in options.connectors:
        if name not in connector_names() or name not in NANO_SIZES:
            raise UserError(f"--connectors: no connector {name!r}: expected one of {', '.join(NANO_SIZES)}")
    return options.connectors


def experiment(
    options: Options,
    data: Path,
    *,
    connector: str,
    encoder: str,
    seed: int,
    factor: float = 1.0,
    steps: float = 1.0,
) -> ExperimentConfig:
    """Returns the config of a run.

    Args:
      options: options of the command, which name the recipe.
      data: folder of the data sets.
      connector: connector of the job.
      encoder: encoder of the job.
      seed: seed of the job.
      factor: factor of the connector's learning rates, in all stages.
      steps: share of the recipe's steps.
    """
    # Change nested fields in a dict of the config. They are checked when the dict is converted back to a config.
    base = load_config(options.config, options.overrides)
    raw = config_to_dict(base)
    raw["seed"] = seed
    raw["data"]["root"] = str(data)
    raw["model"]["connector"] = {"name": connector, **NANO_SIZES[connector]}
    raw["backbones"]["vision"] = vision_folder(options, encoder, base)
    for stage in raw["stages"]:
        stage["steps"] = max(1, round(stage["steps"] * steps))
        # A shortened stage must still end its warm-up.
        stage["warmup_steps"] = min(stage["warmup_steps"], stage["steps"] - 1)
        stage["learning_rates"]["connector"] *= factor
    config = config_from_dict(raw)
    return dataclasses.replace(config, data=one_page_per_bin(config))


def on_split(config: ExperimentConfig, split: str) -> ExperimentConfig:
    """Returns the config with all stages on this split, or on part of one such as "train[:100]"."""
    stages = [
        dataclasses.replace(stage, mixture=tuple(dataclasses.replace(part, split=split) for part in stage.mixture))
        for stage in config.stages
    ]
    return dataclasses.replace(config, stages=tuple(stages))


def one_page_per_bin(config: ExperimentConfig) -> DataConfig:
    """Returns the data config with bins for one page: its visual tokens and the longest text of the recipe."""
    packing = config.data.packing
    text = max(stage.max_text_tokens for stage in config.stages)
    visual = packing.tiles_per_bin * tokens_per_tile(config.model)
    packing = dataclasses.replace(packing, tokens_per_bin=visual + text, examples_per_bin=1, window=1)
    return dataclasses.replace(config.data, packing=packing)


def vision_folder(options: Options, encoder: str, config: ExperimentConfig) -> str:
    """Returns the vision folder of an encoder.

    Raises:
      UserError: if the folder does not exist.
    """
    given = dict(options.vision).get(encoder)
    if given is not None:
        return given
    if encoder == FAIR:
        folder = NANO_MODEL.parent / "vision_transcription"
        if not folder.exists():
            raise UserError(f"{folder} does not exist: run tools/make_backbones.py, or use --encoders patches")
        return str(folder)
    return config.backbones.vision


def pages_seen(stages: tuple[StageConfig, ...]) -> int:
    """Returns the number of pages that a run of these stages sees; repeated pages count repeatedly."""
    return sum(stage.steps * stage.bins_per_step for stage in stages)
