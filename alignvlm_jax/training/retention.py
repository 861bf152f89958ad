"""Which checkpoints of a run stay."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what stays of it. What any of the three rules keeps is kept.

    Attributes:
      every_steps: save after so many; the ends of stages are always saved.
      keep: the newest so many. With 2 or more there is one to fall back to should the newest turn out damaged.
      keep_every: those of every so many steps, for good; None for none. A multiple of `every_steps`.
      keep_best: so many of the best by `best_metric`.
      best_metric: by its name in the training log, such as "loss", as it was last logged before the checkpoint.
      best: whether the smallest or the largest is best.
    """

    every_steps: int = 500
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "loss"
    best: Literal["min", "max"] = "min"


def kept_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """The steps that stay, of those there are; `metrics` has what each had come to."""
    steps = sorted(metrics)
    kept = set(steps[-config.keep :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    sign = 1 if config.best == "min" else -1
    ranked = {step: sign * metrics[step].get(config.best_metric, math.nan) for step in steps}
    comparable = sorted((step for step in steps if not math.isnan(ranked[step])), key=ranked.__getitem__)
    return kept | set(comparable[: config.keep_best])
