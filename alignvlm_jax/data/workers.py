"""Worker processes that end with the process that started them, and tasks spread over several of them."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.context
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A worker process was killed while it worked on one of `tasks`, the tasks submitted at that time."""

    def __init__(self, tasks: Sequence[Task]):
        super().__init__(f"a worker process died at one of {len(tasks)} tasks")
        self.tasks = tasks


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[tuple[Task, Result]]:
    """Yields every task with the function's result, in the order in which they finish.

    Where worker processes cannot be started, this process does all tasks.
    """
    processes = min(processes, len(tasks))
    if processes <= 1 or not can_start_workers("one process does all the work"):
        for task in tasks:
            yield task, function(task)
        return
    # "spawn", because a fork of a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, initializer=exit_with_parent)
    stop_watching = watch_workers(pool)
    remaining, running = iter(tasks), {}
    try:
        # Keep two tasks per process submitted, so that no process waits while results are consumed.
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
        stop_watching()
        pool.shutdown(wait=True, cancel_futures=True)


_POLL_SECONDS, _GRACE_SECONDS = 1.0, 2.0


def watch_workers(executor: concurrent.futures.ProcessPoolExecutor) -> Callable[[], None]:
    """Breaks an executor if one of its processes was killed while it sent a result.

    Python notices every other death by itself. But it waits forever for the rest of a result, because other processes
    keep the pipe open.

    Args:
      executor: the executor, of any state.

    Returns:
      A function that ends the watch. Call it before the executor is shut down.
    """
    stopped = threading.Event()

    def watch():
        while not stopped.wait(_POLL_SECONDS):
            processes = list((executor._processes or {}).values())
            if any(process.exitcode is not None for process in processes) and not stopped.wait(_GRACE_SECONDS):
                if not executor._broken:
                    # The end of the pipe ends the wait: no process may have it open for writing.
                    for process in processes:
                        process.kill()
                    executor._result_queue._writer.close()
                return

    thread = threading.Thread(target=watch, name="watch workers", daemon=True)
    thread.start()

    def stop():
        stopped.set()
        thread.join()

    return stop


def can_start_workers(alternative: str) -> bool:
    """Returns whether worker processes can be started here; warns if not.

    Args:
      alternative: what happens without them, for the warning.
    """
    try:
        # Executors communicate through semaphores. They are files in /dev/shm, which some containers lack.
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        tqdm.write(
            f"warning: worker processes cannot start here, because /dev/shm does not work ({error}): {alternative}",
            file=sys.stderr,
        )
        return False
    return True


class _SignalBlockingProcess(multiprocessing.context.SpawnProcess):
    """A process that blocks SIGINT and SIGTERM from its start. Only SIGKILL ends it."""

    def start(self) -> None:
        # Starting the resource tracker unblocks these signals, so it must run before they are blocked.
        multiprocessing.resource_tracker.ensure_running()
        # A child inherits the signal mask. Blocking in the child itself would leave a gap while it starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        # The default implementation sends SIGTERM, which is blocked.
        self.kill()


class SignalBlockingContext(multiprocessing.context.SpawnContext):
    """Starts processes that do not end on the signals sent to a job.

    Ctrl-C reaches every process of a terminal, and Slurm and other schedulers send SIGTERM to every process of a job.
    The parent process may need these workers to finish a step. It ends them itself, or they end when it does
    (`exit_with_parent`).

    Processes are spawned, because a fork of a process in which JAX has started its threads can hang.
    """

    Process = _SignalBlockingProcess


def exit_with_parent() -> None:
    """Makes the current process exit when its parent does."""

    # A worker whose parent was killed would otherwise wait for tasks forever.
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
