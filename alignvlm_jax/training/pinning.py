"""Records in a config which commit of the Hub a run uses, so that a resumed run uses the same weights and tokenizer.

before: config.backbones.language = "org/llama"
after:  config.backbones.language = "org/llama@COMMIT"
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from alignvlm_jax.checkpoints.workdir import CONFIG_FILE
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import read_config_json
from alignvlm_jax.downloads.hub_ids import parse_model
from alignvlm_jax.downloads.sources import hub_id_of, pinned
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.writing import call_in_primary

_KEYS = ("backbones.vision", "backbones.language", "tokenizer")


def pin_sources(config: ExperimentConfig, workdir: Path) -> ExperimentConfig:
    """Returns the experiment with the commit of each model that is on the Hub.

    Without a revision, the commit is the one that the run in `workdir` recorded, or else the newest. All processes must
    call it with the same config. Process 0 asks the Hub, so that all use the same commit.

    Raises:
      UserError: if there is no such model or revision; `TemporaryError` if the Hub cannot be reached.
    """
    names = {key: name for key in _KEYS if (name := _get(config, key)) is not None and _may_be_unpinned(name)}
    if not names:
        return config
    own = call_in_primary(lambda: _pin(names, workdir / CONFIG_FILE))
    commits = distributed.gather_json(own)[0]
    parts = {key.partition(".")[2]: name for key, name in commits.items() if "." in key}
    top = {key: name for key, name in commits.items() if "." not in key}
    return dataclasses.replace(config, backbones=dataclasses.replace(config.backbones, **parts), **top)


def _may_be_unpinned(name: str) -> bool:
    """Returns whether a name has the form of a model on the Hub without a commit. All processes agree on this."""
    hub_id = parse_model(name)
    return hub_id is not None and not hub_id.is_pinned


def _pin(names: Mapping[str, str], recorded_config: Path) -> dict[str, str]:
    """Returns the names with commits."""
    recorded = read_config_json(recorded_config) if recorded_config.is_file() else {}
    return {key: _recorded_commit(name, _get(recorded, key)) or pinned(name) for key, name in names.items()}


def _recorded_commit(name: str, recorded: str | None) -> str | None:
    """Returns the recorded name if it is the same model at a commit, and the name leaves the revision open."""
    hub_id, old = hub_id_of(name), parse_model(recorded) if recorded else None
    if hub_id is None or old is None or not old.is_pinned:
        return None
    return recorded if hub_id.revision is None and hub_id.name == old.name else None


def _get(config: ExperimentConfig | Mapping, key: str) -> str | None:
    """Returns the value at a key, of a config or of its form in JSON."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name)
        if config is None:
            return None
    return config
