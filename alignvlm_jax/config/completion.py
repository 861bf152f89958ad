"""Completes an experiment whose config states only what it changes.

The geometry of the model belongs to the weights that a run starts from: two backbones, or a checkpoint. A config may
leave it out. What it states must agree with the weights.

    complete_config({"model": {"language": {"remat": "full"}}, "stages": [...]}, start)

`interop/start.py` finds the start of a run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.config.building import build, join_names
from alignvlm_jax.config.checks import check
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.geometry import SIZES, check_fits_checkpoint, check_same_model
from alignvlm_jax.config.paths import with_locations
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a run starts from.

    Attributes:
      defaults: values of the keys that a config does not state.
      folders: folders of backbones whose weights the run reads, by part.
      unknown: reason why the geometry of a part is not known, by part. The config has to state it.
      checkpoint: the checkpoint that has all weights of the run; None for backbones.
    """

    defaults: ExperimentConfig = ExperimentConfig()
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checkpoint: str | None = None


def complete_config(raw: Mapping[str, Any], start: Start) -> ExperimentConfig:
    """Returns the checked experiment of a config that may be partial.

    Args:
      raw: nested dicts and lists, as from a config file with its overrides.
      start: what the run starts from.

    Raises:
      UserError: if the config is not valid, contradicts the weights, or lacks a size that they do not tell.
    """
    config = with_locations(build(ExperimentConfig, raw, "config", start.defaults))
    for part, reason in start.unknown.items():
        missing = [name for name in SIZES[part] if not is_stated(raw, f"model.{part}.{name}")]
        if len(missing) == len(SIZES[part]):
            raise UserError(reason)
        if missing:
            raise UserError(f"config.model.{part}: does not state {join_names(missing)}, and {reason}")
    config = _with_dependent_values(config, raw, start)
    check(config)
    if start.checkpoint is not None:
        check_fits_checkpoint(config.model, start.defaults.model, start.checkpoint)
    for part, folder in start.folders.items():
        _check_backbone(part, config.model, start.defaults.model, folder)
    return config


def is_stated(raw: Mapping[str, Any], path: str) -> bool:
    """Returns whether a config states the value at a path such as "model.vision.num_layers"."""
    node: Any = raw
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    return True


def _with_dependent_values(config: ExperimentConfig, raw: Mapping[str, Any], start: Start) -> ExperimentConfig:
    """Returns the config with the values that follow from others, where it does not state them."""
    model, tiling = config.model, config.data.tiling
    if not is_stated(raw, "data.tiling.tile_size"):
        tiling = dataclasses.replace(tiling, tile_size=model.vision.image_size)
    if not is_stated(raw, "model.newline"):
        model = dataclasses.replace(model, newline=tiling.rule == "anyres_max_9")
    # Rows that a config adds to the vocabulary are not words: ALIGN must not mix them into its output.
    if "language" in start.folders and isinstance(model.connector, AlignConfig) and model.connector.vocab_size is None:
        num_words = start.defaults.model.language.vocab_size
        if model.language.vocab_size > num_words:
            model = dataclasses.replace(model, connector=dataclasses.replace(model.connector, vocab_size=num_words))
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, tiling=tiling))


def _check_backbone(part: str, model: AlignVLMConfig, backbones: AlignVLMConfig, folder: str) -> None:
    """Checks that a part of the model has the geometry of its backbone, apart from added rows of the vocabulary."""
    stated, actual = getattr(model, part), getattr(backbones, part)
    if part == "language" and stated.vocab_size > actual.vocab_size:
        actual = dataclasses.replace(actual, vocab_size=stated.vocab_size)
    try:
        check_same_model(f"config.model.{part}", stated, actual, folder)
    except UserError as error:
        raise UserError(f"{error}. Leave them out of the config to take the folder's") from error
