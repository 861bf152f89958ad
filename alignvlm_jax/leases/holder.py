"""Describes the holder of a lease: the process, its machine, and the job that it belongs to."""

import dataclasses
import datetime
import functools
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

JOB_VARIABLE = "ALIGNVLM_JOB"
"""Environment variable with the name of the job. `tools/launch/` sets it: to a JobSet's or a queued resource's name."""
ATTEMPT_VARIABLE = "ALIGNVLM_JOB_ATTEMPT"
"""Environment variable with the number of the job's restarts, if the launcher counts them."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of a scheduler, which may be started several times.

    Attributes:
      name: name that every start of the job has.
      attempt: number of times the job was restarted.
    """

    name: str
    attempt: int = 0


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that holds, or wants, a lease.

    Attributes:
      host: name of its machine.
      pid: id of the process.
      since: time at which it started to wait for the lease, in UTC.
      machine: identifies the running kernel and the table of processes that `pid` belongs to; "" if unknown.
      birth: time at which the process started, as the kernel counts; "" if unknown.
      job: the job that it belongs to, if any.
    """

    host: str
    pid: int
    since: str
    machine: str = ""
    birth: str = ""
    job: Job | None = None

    @classmethod
    def this_process(cls, environ: Mapping[str, str] | None = None) -> "Holder":
        """Returns the holder that this process would be."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        job = job_of(os.environ if environ is None else environ)
        return cls(socket.gethostname(), os.getpid(), now, _machine(), _birth(os.getpid()), job)

    @classmethod
    def from_json(cls, text: str) -> "Holder | None":
        """Reads a holder; returns None if the text is incomplete."""
        try:
            fields = json.loads(text)
            job = fields.pop("job")
            return cls(**fields, job=job and Job(**job))
        except (ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> str:
        """Returns the holder as JSON."""
        return json.dumps(dataclasses.asdict(self))

    def describe(self) -> str:
        """Returns the text for messages."""
        job = f", job {self.job.name}" if self.job else ""
        return f"host {self.host}, pid {self.pid}, since {self.since}{job}"

    def is_running(self) -> bool | None:
        """Returns whether the process runs, or None if it is out of sight: on another machine or in another container.

        A process id that was given to a new process since then does not count as running.
        """
        if not self.machine or self.machine != _machine():
            return None
        return bool(self.birth) and _birth(self.pid) == self.birth


def job_of(environ: Mapping[str, str]) -> Job | None:
    """Returns the job that the environment variables name, or None. An empty variable counts as absent."""
    if name := environ.get(JOB_VARIABLE):
        return Job(name, _number(environ.get(ATTEMPT_VARIABLE)))
    if number := environ.get("SLURM_JOB_ID"):
        # A requeued job keeps its id.
        cluster = environ.get("SLURM_CLUSTER_NAME")
        return Job(f"Slurm {cluster + ' ' if cluster else ''}{number}", _number(environ.get("SLURM_RESTART_COUNT")))
    return None


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


@functools.cache
def _machine() -> str:
    """Returns a text that differs between machines, their boots, and containers with their own process ids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _birth(pid: int) -> str:
    """Returns the time at which a process started, or "" if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name of the program, in parentheses, may contain spaces. The state and the time are fields 3 and 22.
    fields = text.rpartition(")")[2].split()
    # A killed process remains as a zombie until its parent has asked for its exit code. It writes nothing.
    return "" if fields[0] in "ZX" else fields[19]
