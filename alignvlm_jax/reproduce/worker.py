"""The process of one job: `python -m alignvlm_jax.reproduce.worker OUT JOB SHARE PARENT`, started by `scheduler.py`.

The exit codes are those of `alignvlm`: 0 done (or out of time, as the result says), 2 an error that the user can fix,
75 and 130 stopped and resumable.
"""

import os
import sys
import threading
import time
from pathlib import Path

import jax

from alignvlm_jax.errors import UserError
from alignvlm_jax.reproduce import parts, work
from alignvlm_jax.reproduce.options import Options


def main(arguments: list[str]) -> int:
    """Runs the job and returns the exit code."""
    out, name, share, parent = Path(arguments[0]), arguments[1], int(arguments[2]), int(arguments[3])
    # The scheduler passes its process id. Reading it here would miss a scheduler that ended while jax was imported.
    _stop_with(parent)
    # Jobs differ in few programs, so most of what one job compiles serves the others.
    jax.config.update("jax_compilation_cache_dir", str((out / "cache").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    options = Options.load(out)
    job = next(job for job in parts.all_jobs(options) if job.name == name)
    try:
        work.run_job(work.Work(options, out, job, share), parts.named(job.part).run)
        return 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return getattr(error, "exit_code", 130)


def _stop_with(parent: int) -> None:
    """Ends this process as SIGTERM does when the process that started it is gone, even if it was killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), 15)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
