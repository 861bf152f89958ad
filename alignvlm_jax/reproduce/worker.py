"""The process of one job: `python -m alignvlm_jax.reproduce.worker OUT JOB SHARE PARENT`, started by `scheduler.py`.

The exit codes are the same as for `alignvlm`: 0 if the job is done or out of time (the result tells which), 2 for an
error that the user can fix, 75 or 130 if it was stopped and can be resumed.
"""

import os
import sys
import threading
import time
from pathlib import Path

import jax

from alignvlm_jax.errors import UserError
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.reproduce import parts, work
from alignvlm_jax.reproduce.options import Options


@ordinary_modes()
def main(arguments: list[str]) -> int:
    """Runs the job and returns the exit code."""
    out, name, share, parent = Path(arguments[0]), arguments[1], int(arguments[2]), int(arguments[3])
    # The scheduler passes its own process id. `os.getppid()` would return another one here if the scheduler had ended
    # while JAX was being imported.
    _stop_with(parent)
    # Jobs have most of their programs in common, so they share a compilation cache.
    jax.config.update("jax_compilation_cache_dir", str((out / "cache").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    options = Options.load(out)
    job = next(job for job in parts.all_jobs(options) if job.name == name)
    try:
        work.run_job(work.Work(options, out, job, share), parts.named(job.part).run)
        return 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        return getattr(error, "exit_code", 130)


def _stop_with(parent: int) -> None:
    """Sends this process SIGTERM when the process that started it is gone, even if that one was killed."""

    def watch():
        # A process whose parent has ended gets another parent.
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), 15)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
