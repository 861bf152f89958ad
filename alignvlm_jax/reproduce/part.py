"""A part of the report: its jobs, how one of them is run, and its section of the report."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.reproduce.jobs import COMPLETE, Job, Result, read_result
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.work import Work


class Results:
    """Results of the jobs so far.

    Attributes:
      options: options of the command.
      out: output folder of the command.
    """

    def __init__(self, options: Options, out: Path):
        self.options, self.out = options, out

    def complete(self, jobs: Sequence[Job]) -> dict[Job, Result]:
        """Returns the results of the complete jobs; jobs that are missing or ran out of time are skipped."""
        results = {job: read_result(self.out, job) for job in jobs}
        return {job: result for job, result in results.items() if result is not None and result["status"] == COMPLETE}

    def by_seed(self, make_job: Callable[[int], Job]) -> dict[int, Result]:
        """Returns the results of the complete jobs `make_job(seed)`, by seed."""
        seeds = {make_job(seed): seed for seed in range(self.options.seeds)}
        return {seeds[job]: result for job, result in self.complete(list(seeds)).items()}

    def missing(self, jobs: Sequence[Job]) -> str:
        """Returns a line about the jobs that are not complete, or an empty string."""
        results = {job: read_result(self.out, job) for job in jobs}
        stopped = [job for job, result in results.items() if result is not None and result["status"] != COMPLETE]
        absent = [job for job, result in results.items() if result is None]
        notes = [f"**{len(absent)} of {len(jobs)} runs are still missing.**"] if absent else []
        if stopped:
            names = ", ".join(f"{job.name} (step {results[job]['steps']})" for job in stopped)
            notes.append(f"**Stopped at the time limit and excluded: {names}.**")
        return " ".join(notes)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
      name: name for `--only`, and first folder of its jobs.
      title: title of its section.
      jobs: function that returns the jobs for the options.
      run: function that runs a job in its own process. Its return value becomes `found` in the result.
      section: function that returns the section of the report as Markdown, and writes its plots into the folder. It
        accepts any number of results, even none. None adds no section.
      claims: function that returns lines about the paper's claims, generated from the results. None adds no lines.
      closed_jobs: function that returns the jobs of closed experiments. They are never run, and are reported only if
        they have results.
    """

    name: str
    title: str
    jobs: Callable[[Options], list[Job]]
    run: Callable[[Work], dict[str, Any]]
    section: Callable[[Results, Path], str] | None = None
    claims: Callable[[Results], list[str]] | None = None
    closed_jobs: Callable[[Options], list[Job]] | None = None
