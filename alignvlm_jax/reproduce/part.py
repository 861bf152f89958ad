"""A part of the report: which jobs it takes, how one of them is done, and what is said of what they came to."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.reproduce.jobs import COMPLETE, Job, Result, read_result
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.work import Work


class Results:
    """What the jobs came to so far.

    Attributes:
      options: of the whole.
      out: its output folder.
    """

    def __init__(self, options: Options, out: Path):
        self.options, self.out = options, out

    def complete(self, jobs: Sequence[Job]) -> dict[Job, Result]:
        """The jobs that are complete, with their results; what is missing or ran out of time is left out."""
        found = {job: read_result(self.out, job) for job in jobs}
        return {job: result for job, result in found.items() if result is not None and result["status"] == COMPLETE}

    def missing(self, jobs: Sequence[Job]) -> str:
        """A line on what is not complete, empty if all is."""
        found = {job: read_result(self.out, job) for job in jobs}
        stopped = [job for job, result in found.items() if result is not None and result["status"] != COMPLETE]
        absent = [job for job, result in found.items() if result is None]
        says = [f"**{len(absent)} of {len(jobs)} runs are still missing.**"] if absent else []
        if stopped:
            names = ", ".join(f"{job.name} (step {found[job]['steps']})" for job in stopped)
            says.append(f"**Stopped at the time limit and left out: {names}.**")
        return " ".join(says)


@dataclasses.dataclass(frozen=True)
class Part:
    """Attributes:
    name: for `--only`, and the first folder of its jobs.
    title: of its section.
    jobs: the jobs that the options ask for.
    run: does a job in its own process; what it returns becomes `found` in the result.
    section: Markdown of the results, which may be few; plots go into the folder given. None says nothing.
    claims: lines on the paper's claims, generated from the figures; None has none.
    closed_jobs: jobs of closed experiments: never run, and reported only where they have results.
    """

    name: str
    title: str
    jobs: Callable[[Options], list[Job]]
    run: Callable[[Work], dict[str, Any]]
    section: Callable[[Results, Path], str] | None = None
    claims: Callable[[Results], list[str]] | None = None
    closed_jobs: Callable[[Options], list[Job]] | None = None
