"""Experiment configs: frozen dataclasses, read from Python files and from the command line, checked and saved.

    experiment.py       `ExperimentConfig`, the root; settings of model, data and mesh live beside what they configure
    stages.py, optimizer.py, run.py         settings of training, which is built on top of this package
    loading.py          config files and `--config.key=value`
    overrides.py, building.py, checks.py    from nested dicts to checked dataclasses
    serialization.py    to and from the JSON that is saved with every checkpoint

A config file that changes a shipped one begins with `from alignvlm_jax.config import read_config_file`.
"""

import importlib
from typing import Any

_PUBLIC = {"ExperimentConfig": "experiment", "load_config": "loading", "read_config_file": "loading"}

__all__ = ["ExperimentConfig", "load_config", "read_config_file"]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `config.stages` alone needs neither ml_collections nor grain."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
