"""Tasks done by several processes, results as they come; no process outlives the one that started it."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.context
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A process was killed; `tasks` are those that were begun, one of which it was at."""

    def __init__(self, tasks: Sequence[Task]):
        super().__init__(f"a worker process died at one of {len(tasks)} tasks")
        self.tasks = tasks


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[tuple[Task, Result]]:
    """Each task with what the function makes of it, in any order."""
    processes = min(processes, len(tasks))
    if processes <= 1:
        for task in tasks:
            yield task, function(task)
        return
    # "spawn": a fork of a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, initializer=end_with_parent)
    remaining, running = iter(tasks), {}
    try:
        while True:
            for task in remaining:
                running[pool.submit(function, task)] = task
                if len(running) == 2 * processes:
                    break
            if not running:
                return
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                result = future.result()
                yield running.pop(future), result
    except concurrent.futures.process.BrokenProcessPool as error:
        raise WorkerDied(list(running.values())) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _DeafProcess(multiprocessing.context.SpawnProcess):
    """Takes no notice of SIGINT and SIGTERM, from its first moment on: it is ended by SIGKILL."""

    def start(self) -> None:
        multiprocessing.resource_tracker.ensure_running()  # would unblock them when it is started
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # which the child inherits
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        self.kill()


class DeafContext(multiprocessing.context.SpawnContext):
    """Starts processes that the signals to a job do not end.

    Ctrl-C reaches all processes of a terminal, and Slurm and others send SIGTERM to all of a job. The process that
    started these may have to finish something with their help; they are ended by it, or with it (`end_with_parent`).
    "spawn": a fork of a process in which jax has started its threads can hang.
    """

    Process = _DeafProcess


def end_with_parent() -> None:
    """Have the process end with the one that started it: it would wait for tasks from a killed one forever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
