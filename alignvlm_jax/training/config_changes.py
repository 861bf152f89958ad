"""Compares the config of a resumed run with its earlier one, and decides which changes are allowed."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.geometry import is_same_number
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.errors import UserError

# Keys that may differ when a run resumes, because they do not change the trained weights (the mesh, the attention
# kernels and rematerialization change only their rounding).
_MAY_DIFFER = (
    "checkpoint",
    "anomalies.spike",
    "debug",
    "evaluation",
    "log_every_steps",
    "mesh",
    "model.vision.attention",
    "model.language.attention",
    "model.vision.remat",
    "model.language.remat",
    "model.language.loss_memory_mib",
    "profile",
    "data.root",
    "data.max_refused",
    "data.workers",
    "data.read_threads",
    "data.prefetch_batches",
)


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs from the run's earlier config."""

    key: str
    before: Any
    now: Any

    @property
    def affects_results(self) -> bool:
        """True if the key changes what is computed."""
        return not any(_is_under(self.key, key) for key in _MAY_DIFFER)

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} before, {self.now!r} now"


def compare(old: dict[str, Any], new: ExperimentConfig) -> list[Change]:
    """Returns the differences between a saved config and the current one.

    Keys that the saved config lacks have their defaults. A saved key that this version does not know is a difference.
    """
    try:
        # Fills in the defaults of keys that were added since the config was saved.
        old = _with_head_width(config_from_dict(old))
    except UserError:
        return [Change(*difference) for difference in _differences(old, config_to_dict(new))]
    return [Change(*difference) for difference in _differences(old, _with_head_width(new))]


def _with_head_width(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the config as a dict with the width of the heads, which a config may leave to be computed."""
    raw = config_to_dict(config)
    raw["model"]["language"]["head_dim"] = config.model.language.head_width
    return raw


def describe(changes: Sequence[Change]) -> str:
    """Returns the lines that are printed when a run resumes."""
    if not changes:
        return "the config has not changed since the run started"
    return "\n".join(["the config has changed:", *(f"  {change}" for change in changes)])


def check(changes: Sequence[Change], allowed: Sequence[str], workdir: Path) -> None:
    """Refuses changes that would silently turn the run into a different one.

    Args:
      changes: all changes.
      allowed: keys that may change nevertheless. A prefix such as "stages" allows all keys below it.
      workdir: folder of the run, for messages.

    Raises:
      UserError: if a key that affects the results differs and is not allowed.
    """
    relevant = [change for change in changes if change.affects_results]
    refused = [change for change in relevant if not any(_is_under(change.key, key) for key in allowed)]
    if refused:
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        keys = ",".join(change.key for change in refused)
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(map(str, refused[:3]))}{more}): choose another "
            f"workdir, or allow the change with --allow-config-change {keys}"
        )


def _is_under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the differences between two nested structures of dicts and lists, as (path, old, new)."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif not is_same_number(old, new):
        yield path, old, new
