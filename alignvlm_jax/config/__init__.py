"""Experiment configs: frozen dataclasses, read from Python files and from the command line, checked and saved.

    experiment.py       `ExperimentConfig`, the root; settings of model, data and mesh are in their own packages
    stages.py, optimizer.py, run.py         settings of training, which imports this package
    loading.py          config files and `--config.key=value`
    overrides.py, building.py, checks.py    nested dicts to checked dataclasses
    completion.py, geometry.py              configs that state only what they change
    serialization.py    conversion to and from the JSON that is saved with every checkpoint

A config file that changes a shipped one starts with `from alignvlm_jax.config import read_config_file`.
"""

import importlib
from typing import Any

# `load_config` also reads the geometry of backbones and checkpoints, so it is in a package above this one.
_PUBLIC = {
    "ExperimentConfig": "alignvlm_jax.config.experiment",
    "load_config": "alignvlm_jax.interop.start",
    "read_config_file": "alignvlm_jax.config.loading",
}

__all__ = ["ExperimentConfig", "load_config", "read_config_file"]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    # Lazy: `training.train_step` imports `config.stages`, and must not need ml_collections or grain for it.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
