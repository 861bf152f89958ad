"""Reads an experiment together with the geometry of the model that it starts from.

    config = load_config("configs/nano.py", ["seed=1", "stages.0.learning_rates.vision=1e-4", "model.connector=mlp"])

A config states only what it changes. The rest of the model comes from `config.init_from`, a checkpoint, or else from
the two folders in `config.backbones`. Only their `config.json` is read here; `training/initial.py` reads the weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.backbones import RANDOM, backbone_folder, is_random
from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.config.building import build, join_names
from alignvlm_jax.config.completion import Start, complete_config
from alignvlm_jax.config.experiment import BackbonesConfig, ExperimentConfig
from alignvlm_jax.config.geometry import SIZES, without_run_settings
from alignvlm_jax.config.loading import read_raw_config
from alignvlm_jax.config.paths import with_locations
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.downloads.hub_ids import SCHEME
from alignvlm_jax.downloads.sources import hub_id_of
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.interop import published
from alignvlm_jax.interop.huggingface_config import read_language_config, read_vision_config
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a config file, applies overrides, completes the model and checks the result.

    Args:
      file: the config file, or the name of one shipped with the package.
      overrides: "a.b=value", with or without "--config." in front.

    Raises:
      UserError: if the file cannot be read, the config is not valid, or it contradicts what the run starts from.
    """
    raw = read_raw_config(file, overrides)
    config = complete_config(raw, find_start(raw))
    if getattr(config.model.connector, "kept_words", None) is not None:
        raise UserError(
            "config.model.connector.kept_words: expected None, because a pruned model cannot be trained; train the "
            "full model, then prune it with `alignvlm analyze vocabulary --prune`"
        )
    return config


def find_start(raw: Mapping[str, Any]) -> Start:
    """Returns what a run with this config starts from."""
    keys = {key: raw[key] for key in ("init_from", "backbones") if key in raw}
    names = with_locations(build(ExperimentConfig, keys, "config", None))
    if names.init_from is not None:
        return checkpoint_start(names.init_from)
    return backbones_start(names.backbones)


def checkpoint_start(checkpoint: str) -> Start:
    """Returns the start from a checkpoint: its model, and how it cuts pages and fills bins."""
    try:
        source = read_run_config(checkpoint)
    except TemporaryError:
        raise
    except UserError as error:
        return Start(unknown=dict.fromkeys(SIZES, f"config.init_from: {error}"))
    model = without_run_settings(source.model)
    data = DataConfig(tiling=source.data.tiling, packing=source.data.packing)
    return Start(ExperimentConfig(model=model, data=data), checkpoint=checkpoint)


def backbones_start(backbones: BackbonesConfig) -> Start:
    """Returns the start from two backbones and a fresh connector."""
    model, folders, unknown = {}, {}, {}
    for part in SIZES:
        name = getattr(backbones, part)
        try:
            model[part], folder = backbone_geometry(part, name)
        except TemporaryError:
            raise
        except UserError as error:
            unknown[part] = f"config.backbones.{part}: {error}"
            continue
        if folder is not None:
            folders[part] = str(folder)
    return Start(ExperimentConfig(model=AlignVLMConfig(**model)), folders, unknown)


def backbone_geometry(part: str, name: str) -> tuple[VisionConfig | LanguageConfig, Path | None]:
    """Returns the geometry of a backbone and, if it can be read here, its folder.

    Args:
      part: "vision" or "language".
      name: value of `config.backbones`. A well-known model on the Hub has its published geometry, and its name in
        place of a folder.

    Raises:
      UserError: if the geometry is not known.
    """
    if is_random(name):
        like = name.removeprefix(RANDOM).removeprefix(":")
        if not like:
            raise UserError(
                f"{RANDOM!r} has no shape of its own. Write {RANDOM}:NAME, where NAME is a folder or one of "
                f"{join_names(published.names(part))}"
            )
        return backbone_geometry(part, like)[0], None
    known = published.find(part, name)
    if known is not None and hub_id_of(name) is not None:
        return known, Path(name.removeprefix(SCHEME))  # No network is needed.
    try:
        folder = backbone_folder(part, name, with_weights=False, is_quiet=True)
    except UserError:
        if known is None:
            raise
        return known, None
    return (read_vision_config if part == "vision" else read_language_config)(folder), folder
