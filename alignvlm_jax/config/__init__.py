"""Experiment configs: frozen dataclasses, read from Python files and from the command line, checked and saved.

    experiment.py       `ExperimentConfig`, the root; settings of model, data and mesh are in their own packages
    stages.py, optimizer.py, run.py         settings of training, which imports this package
    loading.py          config files and `--config.key=value`
    overrides.py, building.py, checks.py    nested dicts to checked dataclasses
    serialization.py    conversion to and from the JSON that is saved with every checkpoint

A config file that changes a shipped one starts with `from alignvlm_jax.config import read_config_file`.
"""

import importlib
from typing import Any

_PUBLIC = {"ExperimentConfig": "experiment", "load_config": "loading", "read_config_file": "loading"}

__all__ = ["ExperimentConfig", "load_config", "read_config_file"]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    # Lazy: `training.train_step` imports `config.stages`, and must not need ml_collections or grain for it.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
