"""Runs all jobs, several at once, each in its own process. It can be stopped at any time, and resumed by the same call.

A job that is done has a result and is not run again. A job that fails is reported at the end, and the jobs that need it
are skipped; the others continue. Ctrl-C and SIGTERM are passed on to the processes as SIGTERM, at which each one saves
its state.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignvlm_jax.checkpoints.workdir import CHECKPOINTS_FOLDER, complete_steps
from alignvlm_jax.errors import TemporaryError
from alignvlm_jax.parallel import distributed
from alignvlm_jax.progress import progress_bar
from alignvlm_jax.reproduce.jobs import COMPLETE, Job, Result, is_done, read_result
from alignvlm_jax.reproduce.options import Options

LOG_FILE = "log.txt"
# Makes glibc request pages of 2 MB from Linux. XLA allocates its memory anew in every step, and with pages of 4 kB that
# takes a fifth of the time.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_SAVE_TIMEOUT = 120.0  # seconds for a process to save its state
_POLL_INTERVAL = 0.5  # seconds


def worker_command(out: Path, job: Job, share: int) -> list[str]:
    """Returns the command that starts the process of a job; `share` jobs run at the same time."""
    return [sys.executable, "-m", "alignvlm_jax.reproduce.worker", str(out), job.name, str(share), str(os.getpid())]


def run_all(
    options: Options,
    out: Path,
    jobs: Sequence[Job],
    *,
    at_once: int = 1,
    command: Callable[[Path, Job, int], list[str]] = worker_command,
) -> list[str]:
    """Runs the jobs that are not done, in order, and repeats done jobs whose weights are needed but gone.

    Args:
      options: the options saved in `out`.
      out: output folder.
      jobs: the jobs, each after those it needs.
      at_once: number of processes at the same time; with two or more, each is given its share of the cores.
      command: function that returns the command of a job's process.

    Returns:
      For each job that failed or was skipped, a line with the reason.

    Raises:
      distributed.Interrupted: on a signal, after all processes have saved.
    """
    waiting, finished, problems = _sort_jobs(options, out, jobs)
    running: dict[int, _Process] = {}  # by slot
    with _Interruption(running) as interruption, _progress_bar(jobs, waiting) as bar:
        while running or (waiting and not interruption.signal_number):
            # Skip jobs that need a failed one; the next iteration skips those that need a skipped one.
            for job in [job for job in waiting if not problems.keys().isdisjoint(job.needs)]:
                waiting.remove(job)
                problems[job.name] = f"{job.name}: skipped, it needs {next(n for n in job.needs if n in problems)}"
            # Fill the free slots.
            for slot in range(at_once):
                is_free = slot not in running and not interruption.signal_number
                job = _next(waiting, running, finished) if is_free else None
                if job:
                    waiting.remove(job)
                    running[slot] = _Process(options, out, job, slot, at_once, command)
                    if interruption.signal_number:
                        # The signal came while the process was starting, so its handler did not know the process yet.
                        running[slot].stop()
            bar.set_description_str(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs", refresh=False)
            bar.set_postfix_str(", ".join(process.job.name for process in running.values()))
            time.sleep(_POLL_INTERVAL)
            # Collect the processes that have ended.
            for slot, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[slot]
                if code == TemporaryError.exit_code and not interruption.signal_number:
                    # For example, the process of an earlier scheduler, which was killed, is still saving.
                    waiting.insert(0, process.job)
                    continue
                bar.update(process.job.weight)
                problem = process.problem(code)
                if problem is None:
                    finished.add(process.job.name)
                # After a signal, a process without a result was only stopped and is no problem.
                elif not interruption.signal_number:
                    problems[process.job.name] = problem
                    tqdm.write(problem)
    if interruption.signal_number:
        is_terminated = interruption.signal_number == signal.SIGTERM
        raise distributed.Preempted if is_terminated else distributed.Interrupted
    return list(problems.values())


def _sort_jobs(options: Options, out: Path, jobs: Sequence[Job]) -> tuple[list[Job], set[str], dict[str, str]]:
    """Returns the jobs to run, the names of those with a complete result, and the problem of each other job.

    The other jobs were stopped by the same time limit before.
    """
    previous = {job: read_result(out, job) for job in jobs}
    undone = [job for job in jobs if not is_done(previous[job], options.minutes)]
    repeated = _without_weights(out, undone, previous)
    waiting = [job for job in jobs if job in undone or job.name in repeated]
    finished = {job.name for job, result in previous.items() if result is not None and result["status"] == COMPLETE}
    finished -= repeated
    problems = {
        job.name: _describe_stop(job, result)
        for job, result in previous.items()
        if job not in waiting and job.name not in finished
    }
    return waiting, finished, problems


def _progress_bar(jobs: Sequence[Job], waiting: Sequence[Job]) -> tqdm:
    """Returns a bar that advances by the weight of each job."""
    total = sum(job.weight for job in jobs)
    return progress_bar(
        total=round(total, 2),
        initial=round(total - sum(job.weight for job in waiting), 2),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left{postfix}",
    )


def _without_weights(out: Path, undone: Sequence[Job], results: Mapping[Job, Result | None]) -> set[str]:
    """Returns the names of the jobs that are done but whose weights are needed and gone.

    Results are kept with the code, weights are not. The checkpoint of an interrupted repetition does not count: only
    the weights of the last step belong to the result.
    """
    needed = {name for job in undone if job.needs_weights for name in job.needs}
    done = {job: result for job, result in results.items() if job.name in needed and job not in undone}
    return {
        job.name
        for job, result in done.items()
        if result["steps"] not in complete_steps(job.workdir(out) / CHECKPOINTS_FOLDER)
    }


def _next(waiting: Sequence[Job], running: dict[int, Any], finished: set[str]) -> Job | None:
    """Returns the first job that may start now, or None."""
    if any(process.job.runs_alone for process in running.values()):
        return None
    for job in waiting:
        if finished.issuperset(job.needs):
            # Later jobs must not overtake a job that runs alone, or it would never start.
            return None if job.runs_alone and running else job
    return None


class _Process:
    """The process of a job."""

    def __init__(
        self,
        options: Options,
        out: Path,
        job: Job,
        slot: int,
        at_once: int,
        command: Callable[[Path, Job, int], list[str]],
    ):
        self.job, self._options, self._out = job, options, out
        folder = job.folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG_FILE
        self._is_stopping = False
        share = 1 if job.runs_alone else at_once
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        # Every slot has its own cores. With more slots than cores, all processes share all cores.
        own_cores = set(cores[slot::share]) if share <= len(cores) else set(cores)
        with open(self._log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command(out, job, share),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **os.environ},
                start_new_session=True,  # The terminal then sends Ctrl-C only to the scheduler, which passes it on.
            )
        if own_cores:
            os.sched_setaffinity(self._process.pid, own_cores)

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks the process, once, to save and end."""
        if not self._is_stopping:
            self._is_stopping = True
            self._process.terminate()

    def kill(self) -> None:
        """Ends the process without saving."""
        self._process.kill()

    def problem(self, code: int) -> str | None:
        """Returns a line that describes the failure, or None if the job is complete."""
        result = read_result(self._out, self.job)
        if code == 0 and result is not None and result["status"] == COMPLETE:
            return None
        if code == 0 and result is not None:
            return _describe_stop(self.job, result)
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing printed"]
        return f"{self.job.name}: failed with code {code}: {lines[-1][-200:]} ({self._log})"


def _describe_stop(job: Job, result: Result) -> str:
    return f"{job.name}: not done in {result['minutes']:g} minutes, stopped at step {result['steps']}"


class _Interruption:
    """Context in which SIGINT and SIGTERM are passed on to the running processes. A second signal kills them.

    Attributes:
      signal_number: the signal that was received, or None.
    """

    def __init__(self, running: dict[int, _Process]):
        self.signal_number: int | None = None
        self._running, self._previous_handlers = running, {}

    def __enter__(self) -> "_Interruption":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous_handlers = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        # Normally nothing is running here; after an exception, processes may be.
        deadline = time.monotonic() + _SAVE_TIMEOUT
        for process in self._running.values():
            process.stop()
        while any(process.poll() is None for process in self._running.values()):
            if time.monotonic() > deadline:
                for process in self._running.values():
                    process.kill()
            time.sleep(0.1)

    def _receive(self, number: int, frame: Any) -> None:
        for process in self._running.values():
            process.kill() if self.signal_number else process.stop()
        if not self.signal_number:
            tqdm.write("interrupted: the runs are saving their state (interrupt again to stop at once)")
        self.signal_number = number
