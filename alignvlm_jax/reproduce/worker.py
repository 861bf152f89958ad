"""The process of one job: `python -m alignvlm_jax.reproduce.worker OUT JOB [SHARE]`, started by `scheduler.py`.

Exit codes are those of `alignvlm`: 0 done (or out of time: the result says which), 2 the user can fix it, 75 and 130
stopped, to be gone on with.
"""

import os
import sys
import threading
import time
from pathlib import Path

from alignvlm_jax.errors import UserError


def main(arguments: list[str]) -> int:
    out, name, share = Path(arguments[0]), arguments[1], int(arguments[2])
    _stop_with(os.getppid())
    # Jobs differ in little: what one has compiled, the next need not.
    import jax

    jax.config.update("jax_compilation_cache_dir", str((out / "cache").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    from alignvlm_jax.reproduce import parts, work
    from alignvlm_jax.reproduce.options import Options

    options = Options.load(out)
    job = next(job for job in parts.all_jobs(options) if job.name == name)
    try:
        work.do(work.Work(options, out, job, share), parts.named(job.part).run)
        return 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return getattr(error, "exit_code", 130)


def _stop_with(parent: int) -> None:
    """Ends, as on SIGTERM, when the process that started this one is gone, be it killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), 15)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
