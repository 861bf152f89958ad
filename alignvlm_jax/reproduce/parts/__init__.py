"""The parts of the report, in its order. A new part is a file with a `PART` and an entry in `PARTS`."""

from collections.abc import Sequence

from alignvlm_jax.errors import UserError
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.part import Part
from alignvlm_jax.reproduce.parts import accuracy, cost, low_resource, names, noise, restoration, tuning, vocabulary

PARTS: tuple[Part, ...] = (
    accuracy.PART,
    noise.PART,
    low_resource.PART,
    vocabulary.PART,
    restoration.PART,
    names.PART,
    cost.PART,
    tuning.PART,
)


def named(name: str) -> Part:
    """Returns the part of this name.

    Raises:
      UserError: if there is none.
    """
    for part in PARTS:
        if part.name == name:
            return part
    raise UserError(f"--only: no part {name!r}: expected one of {', '.join(part.name for part in PARTS)}")


def closed_jobs(options: Options) -> list[Job]:
    """Returns the jobs of closed experiments, which are never run, and reported only if they have results."""
    return [job for part in PARTS if part.closed_jobs is not None for job in part.closed_jobs(options)]


def all_jobs(options: Options, only: Sequence[str] = ()) -> list[Job]:
    """Returns all jobs, or the jobs of some parts and the jobs they need, in the order in which they run.

    The order is wave by wave, so the first runs of all connectors come before any second run. Within a wave, a job
    comes after the jobs that it needs.
    """
    jobs = {job.name: job for part in PARTS for job in part.jobs(options)}
    selected = [named(name).name for name in only] or [part.name for part in PARTS]
    chosen: dict[str, Job] = {}

    def add_with_needs(job: Job) -> None:
        for name in job.needs:
            add_with_needs(jobs[name])
        chosen.setdefault(job.name, job)

    for job in sorted(jobs.values(), key=lambda job: job.wave):  # stable: keeps the order of the parts within a wave
        if job.part in selected:
            add_with_needs(job)
    return list(chosen.values())
