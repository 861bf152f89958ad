"""What may change in a config when a run goes on, and what must be named to be changed."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.errors import UserError

# Keys that may differ when a run is resumed: they change where and how often, never what is computed.
_MAY_DIFFER = (
    "checkpoint",
    "anomalies.spike",
    "debug",
    "evaluation",
    "log_every_steps",
    "mesh",
    "model.vision.attention",
    "model.language.attention",
    "profile",
    "data.root",
    "data.max_refused",
    "data.workers",
    "data.read_threads",
    "data.prefetch_batches",
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One key that differs from the config that the run has had so far."""

    key: str
    before: Any
    now: Any

    @property
    def matters(self) -> bool:
        """Whether it changes what is computed."""
        return not any(_is_under(self.key, key) for key in _MAY_DIFFER)

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} there, {self.now!r} now"


def compare(old: dict[str, Any], new: ExperimentConfig) -> list[Change]:
    """The differences between a config as it was saved and another.

    Keys that came with a later version have their defaults; a key that this version does not know is a difference.
    """
    try:
        old = config_to_dict(config_from_dict(old))
    except UserError:
        pass
    return [Change(*difference) for difference in _differences(old, config_to_dict(new))]


def describe(changes: Sequence[Change]) -> str:
    """What is printed before a run goes on."""
    if not changes:
        return "the config is the one that the run began with"
    return "\n".join(["the config has changed:", *(f"  {change}" for change in changes)])


def check(changes: Sequence[Change], allowed: Sequence[str], workdir: Path) -> None:
    """Refuses changes that would silently make it another run.

    Args:
      changes: all there are.
      allowed: keys, or what stands above several, that may change all the same.
      workdir: of the run, for messages.

    Raises:
      UserError: there are others.
    """
    serious = [change for change in changes if change.matters]
    refused = [change for change in serious if not any(_is_under(change.key, key) for key in allowed)]
    if refused:
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        keys = ",".join(change.key for change in refused)
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(map(str, refused[:3]))}{more}): choose another "
            f"workdir, or go on with the change by --allow-config-change {keys}"
        )


def _is_under(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nests of dicts and lists differ, as (path, old, new)."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new
