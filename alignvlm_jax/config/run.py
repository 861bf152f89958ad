"""Settings of a run: saving, scoring, profiling, and the handling of anomalies."""

import dataclasses
import re
from typing import Literal


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of checkpoints: when to save the run, and which checkpoints to keep.

    A checkpoint is kept if at least one of the rules `keep`, `keep_every` and `keep_best` keeps it.

    Attributes:
      every_steps: number of steps between checkpoints. The end of a stage is always saved.
      keep: number of newest checkpoints to keep. With 2 or more, the run can use an older one if the newest is damaged.
      keep_every: every checkpoint whose step is a multiple of this is kept permanently; None keeps none. It must be a
        multiple of `every_steps`.
      keep_best: number of best checkpoints to keep, by `best_metric`.
      best_metric: name of a metric in the training log, such as "loss". Its last logged value before the checkpoint
        counts.
      best: "min" if the smallest value is best, "max" if the largest is.
    """

    every_steps: int = 500
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "loss"
    best: Literal["min", "max"] = "min"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of scoring during training, on a few documents. Scoring does not change the trained weights.

    Attributes:
      every_steps: number of steps between scores; None never scores.
      dataset: a folder under `data.root`; None uses the data set of the last stage.
      split: a split of the data set.
      limit: number of questions to ask, from the first; None asks all.
      batch_size: number of questions decoded at once, rounded up to a multiple of what the mesh requires.
      max_new_tokens: length at which an unfinished answer is truncated. A truncated answer is wrong anyway.
      log_answers_every_steps: number of steps between answers that the trackers show with their pages; None shows none.
      logged_answers: number of these answers, each about another page.
    """

    every_steps: int | None = None
    dataset: str | None = None
    split: str = "validation"
    limit: int | None = 256
    batch_size: int = 32
    max_new_tokens: int = 32
    log_answers_every_steps: int | None = None
    logged_answers: int = 4


@dataclasses.dataclass(frozen=True)
class AnomalyConfig:
    """Settings of the reaction to skipped updates and to jumps of the loss.

    Attributes:
      max_skipped: number of skipped updates in a row at which the run reacts.
      then: reaction to too many skipped updates: "rollback" returns to the last checkpoint and skips the data since
        then, "stop" ends the run.
      max_rollbacks: number of rollbacks to the same checkpoint after which the run ends.
      spike: a loss is reported if it exceeds the median of the last hundred losses by more than this many times their
        spread. The spread is 1.4826 times the median distance from the median, which for a normal distribution is the
        standard deviation. 0 reports nothing.
    """

    max_skipped: int = 5
    then: Literal["rollback", "stop"] = "rollback"
    max_rollbacks: int = 3
    spike: float = 10.0


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Settings for debugging.

    Attributes:
      nans: whether to check every step. A step whose loss or gradients are not finite is repeated operation by
        operation; the run then ends and names the first operation that returned NaN. The loop waits for every step, and
        the search takes minutes on a large model.
    """

    nans: bool = False


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Settings of the profiler.

    Attributes:
      steps: "first:stop", in steps of the run counted from 1, as in the log: "10:13" traces steps 10, 11 and 12. None
        traces nothing. The first step of a stage includes compilation, so choose later ones. Traced steps are slower.
    """

    steps: str | None = None


def traced_steps(config: ProfileConfig) -> range:
    """Returns the steps that `config.steps` selects.

    Raises:
      ValueError: if it is not of the form "first:stop".
    """
    if config.steps is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", config.steps)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"expected first:stop, such as 10:13 for steps 10, 11 and 12, got {config.steps!r}")
    return range(int(match[1]), int(match[2]))
