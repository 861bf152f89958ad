"""The locations in an experiment: paths on a disk, in which `~` is expanded, and folders in a bucket."""

import dataclasses
from collections.abc import Callable
from typing import Any

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import model_location, parse_location


def with_locations(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the experiment with its locations parsed.

    The packages that reach buckets may be missing, because a config may be that of a run on another machine.

    Raises:
      UserError: if a location is malformed. The message names its key.
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


def _replace(owner: Any, path: str, *names: str, parse: Callable[[str], str] = parse_location) -> Any:
    """Returns a part of the experiment with the locations in these fields parsed."""
    parsed = {}
    for name in names:
        if (value := getattr(owner, name)) is not None:
            try:
                parsed[name] = parse(value)
            except UserError as error:
                raise UserError(f"{path}.{name}: {error}") from error
    return dataclasses.replace(owner, **parsed)
