"""Converts experiments to and from nested dicts and JSON, the form in which every checkpoint stores its config."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignvlm_jax.config.building import build, connector_name
from alignvlm_jax.config.checks import check
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.paths import with_locations
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage.errors import translated_errors


def config_from_dict(raw: Mapping[str, Any]) -> ExperimentConfig:
    """Returns a checked config from nested dicts and lists, as from a config file or `config_to_dict`."""
    config = with_locations(build(ExperimentConfig, raw, "config", None))
    check(config)
    return config


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the config as nested dicts and lists that JSON can hold. Inverse of `config_from_dict`."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))  # turns tuples into lists
    # The class of the connector's config is lost in a dict, so its name is added.
    raw["model"]["connector"]["name"] = connector_name(config.model.connector)
    return raw


def config_to_json(config: ExperimentConfig) -> str:
    """Returns the JSON text of a config, as it is saved with every checkpoint."""
    return json.dumps(config_to_dict(config), indent=2) + "\n"


def read_config_json(path: Path) -> dict[str, Any]:
    """Reads what `config_to_json` returned, as nested dicts and lists for `config_from_dict`."""
    try:
        with translated_errors(str(path)):
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the config of a run ({error})") from error


def config_hash(config: ExperimentConfig) -> str:
    """Returns a short hash of the config. Two runs with the same hash are the same experiment."""
    return hashlib.sha256(json.dumps(config_to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
