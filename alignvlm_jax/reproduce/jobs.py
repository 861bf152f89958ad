"""Jobs: one run each, with a folder and a result.

    OUT/runs/PART/ENCODER/CONNECTOR/VARIANT/result.json     the result; exists exactly if the job is done
                                           /workdir/        checkpoints, if the job trains
                                           /log.txt         output of its process

The list of jobs depends on the options only. A job that is done is never repeated.
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
      part: the part of the report it belongs to, which defines how it is run.
      encoder: one of `options.ENCODERS`.
      connector: one of `options.CONNECTORS`.
      seed: seed of the initial connector weights and of the order of the data. The order is the same for all
        connectors.
      variant: distinguishes it from the other jobs of its part with the same seed, such as "rate1e-3".
      setting: values that `variant` stands for, read by the part.
      needs: names of the jobs whose results it uses.
      needs_weights: whether it uses their trained weights as well.
      wave: jobs run wave by wave, so that a run that is stopped early has first results of everything.
      weight: rough duration, in units of a training run.
      runs_alone: whether no other job may run at the same time, because it measures time.
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
        """Unique name, which is also its folder below OUT/runs."""
        last = f"{self.variant}-seed{self.seed}" if self.variant else f"seed{self.seed}"
        return f"{self.part}/{self.encoder}/{self.connector}/{last}"

    def folder(self, out: Path) -> Path:
        """Returns the folder of the job."""
        return out / "runs" / self.name

    def workdir(self, out: Path) -> Path:
        """Returns the folder of its checkpoints, if it trains."""
        return self.folder(out) / "workdir"

    def __getitem__(self, name: str) -> Any:
        """Returns a value of `setting`."""
        return dict(self.setting)[name]


Result = dict[str, Any]
"""Content of a job's result.json: see `work.Work.finish`."""


def read_result(out: Path, job: Job) -> Result | None:
    """Returns the result of the job, or None if it is not done."""
    try:
        return json.loads((job.folder(out) / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def is_done(result: Result | None, minutes: float) -> bool:
    """Returns True if the job needs no more work; one that was stopped at a time limit continues under a higher one."""
    return result is not None and (result["status"] == COMPLETE or result["minutes"] >= minutes)
