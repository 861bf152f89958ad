"""Defines the jobs of a comparison. A job is one run, with a folder and a result.

    OUT/runs/PART/ENCODER/CONNECTOR/VARIANT/result.json     the result; written when the job ends
                                           /workdir/        checkpoints, if the job trains
                                           /log.txt         output of its process

The list of jobs depends only on the options. A finished job is repeated only if another job
needs its weights and they are gone (`scheduler.py`).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"
COMPLETE, OVER_TIME = "complete", "over time"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      part: part of the report that the job belongs to, which defines how the job is run.
      encoder: one of `options.ENCODERS`.
      connector: one of `options.CONNECTORS`.
      seed: seed of the initial connector weights and of the order of the data. The order is the same for all
        connectors.
      variant: name that distinguishes the job from others of its part with the same seed, such as "rate-x4".
      setting: values that `variant` stands for. The part reads them.
      needs: names of the jobs whose results this one uses.
      needs_weights: whether it also uses their trained weights.
      wave: number of the job's wave. Jobs run wave by wave, so that a comparison that is stopped early has some
        results for every part.
      weight: rough duration, in units of a training run.
      runs_alone: whether no other job may run at the same time, because this one measures time.
    """

    part: str
    encoder: str
    connector: str
    seed: int = 0
    variant: str = ""
    setting: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    needs_weights: bool = False
    wave: int = 0
    weight: float = 1.0
    runs_alone: bool = False

    @property
    def name(self) -> str:
        """Unique name of the job, and its folder below OUT/runs."""
        last = f"{self.variant}-seed{self.seed}" if self.variant else f"seed{self.seed}"
        return f"{self.part}/{self.encoder}/{self.connector}/{last}"

    def folder(self, out: Path) -> Path:
        """Returns the folder of the job."""
        return out / "runs" / self.name

    def workdir(self, out: Path) -> Path:
        """Returns the folder of the job's checkpoints, if it trains."""
        return self.folder(out) / "workdir"

    def __getitem__(self, name: str) -> Any:
        """Returns a value of `setting`."""
        return dict(self.setting)[name]


Result = dict[str, Any]
"""Content of a job's result.json: see `work.Work.finish`."""


def read_result(out: Path, job: Job) -> Result | None:
    """Returns the result of the job, or None if there is none yet."""
    try:
        return json.loads((job.folder(out) / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def is_done(result: Result | None, minutes: float) -> bool:
    """Returns True if the job needs no more work. A job stopped by its time limit resumes if the limit is raised."""
    return result is not None and (result["status"] == COMPLETE or result["minutes"] >= minutes)
