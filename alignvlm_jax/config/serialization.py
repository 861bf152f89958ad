"""Experiments as nested dicts and as JSON, the form in which they are saved with every checkpoint."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignvlm_jax.config.building import build, connector_name
from alignvlm_jax.config.checks import check
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.errors import UserError


def config_from_dict(raw: Mapping[str, Any]) -> ExperimentConfig:
    """Nested dicts and lists, as a config file or `config_to_dict` gives them, into a checked config."""
    config = build(ExperimentConfig, raw, "config", None)
    check(config)
    return config


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The config as nested dicts and lists that JSON can hold; `config_from_dict` undoes it."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    raw["model"]["connector"]["name"] = connector_name(config.model.connector)
    return raw


def config_to_json(config: ExperimentConfig) -> str:
    """The config as it is saved with every checkpoint."""
    return json.dumps(config_to_dict(config), indent=2) + "\n"


def read_config_json(path: Path) -> dict[str, Any]:
    """What `config_to_json` wrote, as plain dicts and lists: `config_from_dict` makes a config of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the config of a run ({error})") from error


def config_hash(config: ExperimentConfig) -> str:
    """A short name of this very config; two runs with the same one are the same experiment."""
    return hashlib.sha256(json.dumps(config_to_dict(config), sort_keys=True).encode()).hexdigest()[:12]

