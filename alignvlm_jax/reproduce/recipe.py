"""What a job trains: `configs/reproduce.py`, and on it only what the job is about.

Everything else is the same for all connectors: the backbones, the pages of every step, the number of steps, the
schedule, the rates of encoder and decoder. The pages: a bin holds one, so neither the number of visual tokens nor the
length of a text decides which pages share a step.
"""

import dataclasses
from pathlib import Path

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.loading import load_config
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import tokens_per_tile
from alignvlm_jax.models.connectors import CONNECTOR_CONFIGS
from alignvlm_jax.reproduce.options import FAIR, Options

# Sizes for tiles of 10 x 10 features, a decoder of width 128 and 512 words. Where a connector reduces, it keeps at
# least the share of tokens that it keeps in the paper: a nano page has a letter in every patch, and less to leave out.
NANO_SIZES = {
    "align": dict(vocab_scale_init=2.0),
    "mlp": {},
    # 64 latents as in Idefics2, here of 100 features (there of 729); heads as wide as the decoder's.
    "perceiver": dict(num_latents=64, depth=3, num_heads=4, num_kv_heads=2, head_dim=32),
    # As many visual words as ALIGN has words.
    "ovis": dict(num_words=512),
    "h_reducer": dict(window=4),
    # 8 x 8 of 10 x 10 (the paper's: 12 x 12 of 27 x 27).
    "c_abstractor": dict(num_tokens=64, hidden_size=128),
}

RATE_FACTORS = (1.0, 4.0, 16.0, 64.0)
"""The grid of tuning: multiples of the connector's learning rates in the recipe. Those are the demo's, whose encoder
speaks in letters already; connectors that have to find them, in as few steps, want more."""

TUNING_SHARE = 1 / 3
"""Steps of a tuning run, as a share of those of a run; its schedule ends with it."""


def connectors(options: Options) -> tuple[str, ...]:
    """The connectors to be compared, in the order of the tables."""
    for name in options.connectors:
        if name not in CONNECTOR_CONFIGS or name not in NANO_SIZES:
            raise UserError(f"--connectors: no connector {name!r}: one of {', '.join(NANO_SIZES)}")
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
    """The config of a run.

    Args:
      options: for the recipe.
      data: the folder of the data sets.
      connector, encoder, seed: of the job.
      factor: of the connector's learning rates, in all stages.
      steps: share of the recipe's steps.
    """
    base = load_config(options.config, options.overrides)
    raw = config_to_dict(base)
    raw["seed"] = seed
    raw["data"]["root"] = str(data)
    raw["model"]["connector"] = {"name": connector, **NANO_SIZES[connector]}
    raw["backbones"]["vision"] = vision_folder(options, encoder, base)
    for stage in raw["stages"]:
        stage["steps"] = max(1, round(stage["steps"] * steps))
        stage["warmup_steps"] = min(stage["warmup_steps"], stage["steps"] - 1)
        stage["learning_rates"]["connector"] *= factor
    config = config_from_dict(raw)
    return dataclasses.replace(config, data=fitted(config))


def on_split(config: ExperimentConfig, split: str) -> ExperimentConfig:
    """The config with all stages on this split, or part of one."""
    stages = [
        dataclasses.replace(stage, mixture=tuple(dataclasses.replace(part, split=split) for part in stage.mixture))
        for stage in config.stages
    ]
    return dataclasses.replace(config, stages=tuple(stages))


def fitted(config: ExperimentConfig):
    """The data config with bins of exactly one page: its visual tokens and the most text that the recipe allows."""
    packing = config.data.packing
    text = max(stage.max_text_tokens for stage in config.stages)
    visual = packing.tiles_per_bin * tokens_per_tile(config.model)
    packing = dataclasses.replace(packing, tokens_per_bin=visual + text, examples_per_bin=1, window=1)
    return dataclasses.replace(config.data, packing=packing)


def vision_folder(options: Options, encoder: str, config: ExperimentConfig) -> str:
    """The backbone that `encoder` names."""
    given = dict(options.vision).get(encoder)
    if given is not None:
        return given
    if encoder == FAIR:
        folder = NANO_MODEL.parent / "vision_transcription"
        if not folder.exists():
            raise UserError(f"{folder} is not there: make it by tools/make_backbones.py, or --encoders patches")
        return str(folder)
    return config.backbones.vision


def pages_seen(stages: tuple[StageConfig, ...]) -> int:
    """Pages that a run of these stages sees, each counted as often as it comes."""
    return sum(stage.steps * stage.bins_per_step for stage in stages)
