"""Does all jobs, so many at once, each in a process of its own; stopped at any time, and continued by the same call.

A job that is done has a result and is left alone. One that fails is named at the end, and what needs it is left out;
the others go on. Ctrl-C and SIGTERM reach the processes as SIGTERM: each saves where it is.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignvlm_jax.checkpoints.workdir import CHECKPOINTS_FOLDER, complete_steps
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed
from alignvlm_jax.reproduce.jobs import COMPLETE, Job, Result, is_done, read_result
from alignvlm_jax.reproduce.options import Options

LOG_FILE = "log.txt"
_LOCK_FILE = ".lock"
# glibc then asks Linux for pages of 2 MB: XLA allocates all that a step needs anew, and page by page of 4 kB that is a
# fifth of the step.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_PATIENCE = 120.0  # seconds for a process to save
_TICK = 0.5  # seconds between looks


def worker_command(out: Path, job: Job, share: int) -> list[str]:
    """What starts the process of a job; `share` jobs run at the same time."""
    return [sys.executable, "-m", "alignvlm_jax.reproduce.worker", str(out), job.name, str(share)]


def do_all(
    options: Options,
    out: Path,
    jobs: Sequence[Job],
    *,
    at_once: int = 1,
    command: Callable[[Path, Job, int], list[str]] = worker_command,
) -> list[str]:
    """Does the jobs that are not done, in their order, and again those that are but whose weights are gone and needed.

    Args:
      options: as saved in `out`.
      out: where everything goes.
      jobs: each after those it needs.
      at_once: processes side by side; with two or more each is given its share of the cores.
      command: that does a job.

    Returns:
      For each job that failed or was left out, a line that says why.

    Raises:
      distributed.Interrupted: a signal came, and all processes have saved.
      UserError: another process is at work on `out`.
    """
    before = {job: read_result(out, job) for job in jobs}
    undone = [job for job in jobs if not is_done(before[job], options.minutes)]
    again = _without_weights(out, undone, before)
    waiting = [job for job in jobs if job in undone or job.name in again]
    finished = {job.name for job, result in before.items() if result is not None and result["status"] == COMPLETE}
    finished -= again
    problems = {
        job.name: _stopped(job, result)
        for job, result in before.items()
        if job not in waiting and job.name not in finished
    }
    running: dict[int, _Process] = {}  # by place
    total = sum(job.weight for job in jobs)
    with (
        _locked(out),
        _Interruption(running) as interruption,
        tqdm(
            total=round(total, 2),
            initial=round(total - sum(job.weight for job in waiting), 2),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left{postfix}",
        ) as bar,
    ):
        while running or (waiting and not interruption.came):
            for job in [job for job in waiting if not problems.keys().isdisjoint(job.needs)]:
                waiting.remove(job)
                problems[job.name] = f"{job.name}: left out, it needs {next(n for n in job.needs if n in problems)}"
            for place in range(at_once):
                job = None if place in running or interruption.came else _next(waiting, running, finished)
                if job:
                    waiting.remove(job)
                    running[place] = _Process(options, out, job, place, at_once, command)
            bar.set_description_str(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs", refresh=False)
            bar.set_postfix_str(", ".join(process.job.name for process in running.values()))
            time.sleep(_TICK)
            for place, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[place]
                bar.update(process.job.weight)
                problem = process.problem(code)
                if problem is None:
                    finished.add(process.job.name)
                elif not interruption.came:
                    problems[process.job.name] = problem
                    tqdm.write(problem)
    if interruption.came:
        raise distributed.Preempted if interruption.came == signal.SIGTERM else distributed.Interrupted
    return list(problems.values())


def _without_weights(out: Path, undone: Sequence[Job], results: Mapping[Job, Result | None]) -> set[str]:
    """Jobs that are done, but whose weights are needed and gone: results are kept with the code, weights are not.

    What a training again had saved when it was stopped are not those weights either.
    """
    needed = {name for job in undone if job.needs_weights for name in job.needs}
    done = {job: result for job, result in results.items() if job.name in needed and job not in undone}
    return {
        job.name
        for job, result in done.items()
        if result["steps"] not in complete_steps(job.workdir(out) / CHECKPOINTS_FOLDER)
    }


def _next(waiting: Sequence[Job], running: dict[int, Any], finished: set[str]) -> Job | None:
    """The first job that may start now."""
    if any(process.job.runs_alone for process in running.values()):
        return None
    for job in waiting:
        if finished.issuperset(job.needs):
            # A job that wants to be alone is not overtaken for ever: it starts when the others have ended.
            return None if job.runs_alone and running else job
    return None


class _Process:
    """A job in its process."""

    def __init__(
        self,
        options: Options,
        out: Path,
        job: Job,
        place: int,
        at_once: int,
        command: Callable[[Path, Job, int], list[str]],
    ):
        self.job, self._options, self._out = job, options, out
        folder = job.folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG_FILE
        share = 1 if job.runs_alone else at_once
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        mine = set(cores[place::share]) if share <= len(cores) else set(cores)
        with open(self._log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command(out, job, share),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **os.environ},
                start_new_session=True,  # Ctrl-C is for this process, which passes it on
            )
        if mine:
            os.sched_setaffinity(self._process.pid, mine)

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def problem(self, code: int) -> str | None:
        """What went wrong, in a line; None if nothing did."""
        result = read_result(self._out, self.job)
        if code == 0 and result is not None and result["status"] == COMPLETE:
            return None
        if code == 0 and result is not None:
            return _stopped(self.job, result)
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing printed"]
        return f"{self.job.name}: failed with code {code}: {lines[-1][-200:]} ({self._log})"


def _stopped(job: Job, result: Result) -> str:
    return f"{job.name}: not done in {result['minutes']:g} minutes, stopped at step {result['steps']}"


class _Interruption:
    """While in force, SIGINT and SIGTERM are passed on to the running processes; a second one kills them."""

    def __init__(self, running: dict[int, _Process]):
        self.came: int | None = None
        self._running, self._before = running, {}

    def __enter__(self) -> "_Interruption":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        deadline = time.monotonic() + _PATIENCE
        for process in self._running.values():
            process.stop()
        while any(process.poll() is None for process in self._running.values()):
            if time.monotonic() > deadline:
                for process in self._running.values():
                    process.kill()
            time.sleep(0.1)

    def _note(self, number: int, frame: Any) -> None:
        for process in self._running.values():
            process.kill() if self.came else process.stop()
        if not self.came:
            tqdm.write("interrupted: the runs are saving (once more to stop at once)")
        self.came = number


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / _LOCK_FILE, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out}: another `alignvlm reproduce` is at work there") from error
        yield
