"""Settings of a run: when it is saved, scored, profiled and debugged, and what happens when numbers go wrong."""

import dataclasses
import re
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


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores the weights in training on a few documents, where they lie; training goes on as if nothing had happened.

    Attributes:
      every_steps: how often; None never.
      dataset: a folder under `data.root`; None is the one that the last stage is trained on.
      split: which of its splits.
      limit: ask only the first so many questions; None asks all.
      batch_size: questions decoded at once, rounded up to what the mesh divides.
      max_new_tokens: where an answer that does not end is cut off; it is wrong then.
    """

    every_steps: int | None = None
    dataset: str | None = None
    split: str = "validation"
    limit: int | None = 256
    batch_size: int = 32
    max_new_tokens: int = 32


@dataclasses.dataclass(frozen=True)
class AnomalyConfig:
    """When numbers count as wrong, and what is done.

    Attributes:
      max_skipped: so many skipped updates in a row are too many.
      then: what is done about them: back to the last checkpoint and past these data, or an end.
      max_rollbacks: going back to the same checkpoint more often than this ends the run.
      spike: a loss is reported that lies above the median of the last hundred by more than so many times their spread
        (the median distance from the median, times 1.4826: the standard deviation of a normal distribution); 0 reports
        none.
    """

    max_skipped: int = 5
    then: Literal["rollback", "stop"] = "rollback"
    max_rollbacks: int = 3
    spike: float = 10.0


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Attributes:
    nans: look at every step, and do one whose loss or gradients are not finite again, operation by operation: the run
      ends and names the first that gave NaN. Waits for each step; the search takes minutes on a large model.
    """

    nans: bool = False


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What is traced.

    Attributes:
      steps: "first:stop", in steps of the run as the log counts them, from 1: "10:13" traces steps 10, 11 and 12. None
        traces nothing. The first step of a stage compiles: choose later ones. Tracing slows the traced steps down.
    """

    steps: str | None = None


def traced_steps(config: ProfileConfig) -> range:
    """The steps of `config.steps`.

    Raises:
      ValueError: what it says are no steps.
    """
    if config.steps is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", config.steps)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"expected first:stop, such as 10:13 for steps 10, 11 and 12, got {config.steps!r}")
    return range(int(match[1]), int(match[2]))

