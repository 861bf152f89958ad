"""A job: one run, with a folder and a result of its own.

    OUT/runs/PART/ENCODER/CONNECTOR/VARIANT/result.json     what it came to; there exactly if the job is done
                                           /workdir/        checkpoints, if it trains
                                           /log.txt         what it printed

Which jobs there are is a function of the options alone; a job that is done is never done again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"
COMPLETE, OVER_TIME = "complete", "over time"


@dataclasses.dataclass(frozen=True)
class Job:
    """Attributes:
    part: the part of the report it belongs to; says how it is done.
    encoder: one of `options.ENCODERS`.
    connector: one of `options.CONNECTORS`.
    seed: of initial connector weights and of the order of the data: the same order for all connectors.
    variant: what sets it apart from the part's other jobs with this seed, such as "rate1e-3".
    setting: what `variant` stands for, for the part to read.
    needs: names of jobs whose results it builds upon.
    takes_weights: whether it needs their trained weights as well.
    wave: jobs go wave by wave, so that whoever stops early has a first figure of everything.
    weight: how long it takes, very roughly, in units of a training run.
    alone: nothing else may run beside it: it measures time.
    """

    part: str
    encoder: str
    connector: str
    seed: int = 0
    variant: str = ""
    setting: tuple[tuple[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    takes_weights: bool = False
    wave: int = 0
    weight: float = 1.0
    alone: bool = False

    @property
    def name(self) -> str:
        """Also its folder below OUT/runs."""
        last = f"{self.variant}-seed{self.seed}" if self.variant else f"seed{self.seed}"
        return f"{self.part}/{self.encoder}/{self.connector}/{last}"

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.name

    def workdir(self, out: Path) -> Path:
        """Where its weights are, if it trains."""
        return self.folder(out) / "workdir"

    def __getitem__(self, name: str) -> Any:
        return dict(self.setting)[name]


Result = dict[str, Any]
"""What a job came to: see `work.Work.finish`."""


def read_result(out: Path, job: Job) -> Result | None:
    """What the job came to, None if it is not done."""
    try:
        return json.loads((job.folder(out) / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def is_done(result: Result | None, minutes: float) -> bool:
    """Whether the job needs no more work; one that was stopped at the cap has more to do under a higher cap."""
    return result is not None and (result["status"] == COMPLETE or result["minutes"] >= minutes)
