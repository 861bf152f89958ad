"""Starts the processes of a distributed run on this machine.

Each process runs `worker.py` with its own CPU devices and joins the run by explicit arguments, as
`alignvlm train --coordinator` does.
"""

import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Process:
    """A process of the run, and the file that receives its output."""

    process: subprocess.Popen
    output: pathlib.Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 400) -> None:
        """Waits until the output matches a pattern."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)


def start(folder: pathlib.Path, task: str, num_processes: int, *, devices: int = 2, **arguments) -> list[Process]:
    """Starts processes that run a task of `worker.py`.

    Args:
      folder: folder for their output; process 0 writes to 0.txt.
      task: name of a function in `worker.py`.
      num_processes: number of processes.
      devices: number of devices of each process.
      **arguments: arguments of the task. A list holds one value for each process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A free port for the coordinator. It is closed again here; process 0 opens it.
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    if num_processes > 1:
        # XLA for CPUs may run the collectives of a program from the cache in another order than the process that
        # compiled it, mostly on a busy machine. Processes that compute together would then abort.
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    processes = []
    for i in range(num_processes):
        own_arguments = {key: value[i] if isinstance(value, list) else value for key, value in arguments.items()}
        command = [sys.executable, "-m", "tests.parallel.worker", task, f"localhost:{port}", str(num_processes), str(i)]
        output = folder / f"{i}.txt"
        with output.open("w") as out:
            process = subprocess.Popen(
                [*command, json.dumps(own_arguments)], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
            )
        processes.append(Process(process, output))
    return processes


def finish(processes: list[Process], seconds: float = 400) -> list[int]:
    """Returns the exit codes of all processes; kills them and fails if they take longer than `seconds`."""
    deadline = time.monotonic() + seconds
    try:
        return [process.process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError("\n".join(process.text() for process in processes)) from error
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()
