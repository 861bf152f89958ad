"""The parts of the report, in its order. A new part is a file with its `PART`, and a place in this list."""

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
    """The part of this name."""
    for part in PARTS:
        if part.name == name:
            return part
    raise UserError(f"--only: no part {name!r}: one of {', '.join(part.name for part in PARTS)}")


def closed_jobs(options: Options) -> list[Job]:
    """Jobs of closed experiments: never run, and reported only where they have results."""
    return [job for part in PARTS if part.closed_jobs is not None for job in part.closed_jobs(options)]


def all_jobs(options: Options, only: Sequence[str] = ()) -> list[Job]:
    """Every job there is, or those of some parts with what they need, in the order in which they are done.

    Wave by wave, and what is needed before who needs it: all connectors' first runs come before any second one.
    """
    jobs = {job.name: job for part in PARTS for job in part.jobs(options)}
    asked = [named(name).name for name in only] or [part.name for part in PARTS]
    chosen: dict[str, Job] = {}

    def take(job: Job) -> None:
        for name in job.needs:
            take(jobs[name])
        chosen.setdefault(job.name, job)

    for job in sorted(jobs.values(), key=lambda job: job.wave):  # stable: within a wave as the parts have it
        if job.part in asked:
            take(job)
    return list(chosen.values())
