"""The interface of a tracker, and what it is told about a run.

Axes: H height and W width of a page in pixels.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Facts about a run that a tracker stores with it.

    Attributes:
      workdir: folder of the run; its name is the name of the run.
      config: the experiment, as nested dictionaries.
      commit: commit of the code (`checkpoints/provenance.py`); None if it is not known.
      first_step: number of steps that are already done. An earlier session may have logged later steps, after the
        checkpoint that the run resumes from. They are repeated.
      id: identifier of the run in this tracker. It stays the same when the run resumes.
      is_resumed: whether an earlier session used this tracker.
    """

    workdir: Path
    config: Mapping[str, Any]
    commit: str | None = None
    first_step: int = 0
    id: str = ""
    is_resumed: bool = False


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """An answer that the model gave during training, with its page.

    Attributes:
      page: the page; None for a question without an image.
      question: the question.
      expected: the right answer.
      predicted: the answer of the model.
    """

    page: UInt8[np.ndarray, "H W 3"] | None
    question: str
    expected: str
    predicted: str

    @property
    def caption(self) -> str:
        """Question and answers in one line."""
        return " ".join(f"{self.question} -> {self.predicted} (expected: {self.expected})".split())


class Tracker(abc.ABC):
    """Stores the curves of a run. Every method may raise any error; `Trackers` handles them."""

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve, by its name, such as "train/loss"."""

    @abc.abstractmethod
    def log_answers(self, step: int, answers: Mapping[str, ShownAnswer]) -> None:
        """Adds answers by name, such as "validation/answer_0"; the same names in every tracker."""

    def rewind(self, step: int) -> None:  # noqa: B027 (most trackers need not know)
        """Tells the tracker that the run is back at `step`, so that later steps are repeated with other data."""

    @abc.abstractmethod
    def close(self, exit_code: int) -> None:
        """Stores everything that is still queued. `exit_code` is 0 if the run is complete."""


def named_answers(split: str, answers: Sequence[ShownAnswer]) -> dict[str, ShownAnswer]:
    """Returns the answers by name."""
    return {f"{split}/answer_{index}": answer for index, answer in enumerate(answers)}
