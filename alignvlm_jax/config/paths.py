"""The paths in an experiment: all of them are on a disk, and `~` is expanded."""

import dataclasses
from collections.abc import Callable
from typing import Any

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import local_path, model_location


def with_local_paths(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the experiment with `~` expanded in its paths.

    Raises:
      UserError: if a path is a URL. The message names its key.
    """
    stages = tuple(
        dataclasses.replace(
            stage,
            mixture=tuple(
                _replace(part, f"config.stages.{index}.mixture.{number}", "dataset")
                for number, part in enumerate(stage.mixture)
            ),
        )
        for index, stage in enumerate(config.stages)
    )
    return dataclasses.replace(
        _replace(_replace(config, "config", "init_from"), "config", "tokenizer", parse=model_location),
        data=_replace(config.data, "config.data", "root"),
        backbones=_replace(config.backbones, "config.backbones", "vision", "language", parse=model_location),
        evaluation=_replace(config.evaluation, "config.evaluation", "dataset"),
        stages=stages,
    )


def _replace(owner: Any, path: str, *names: str, parse: Callable[[str], str] = local_path) -> Any:
    """Returns a part of the experiment with the paths in these fields parsed."""
    paths = {}
    for name in names:
        if (value := getattr(owner, name)) is not None:
            try:
                paths[name] = parse(value)
            except UserError as error:
                raise UserError(f"{path}.{name}: {error}") from error
    return dataclasses.replace(owner, **paths)
