"""Start-up of `alignvlm ask` on the nano model, compared with the start-up of JAX.

Three commands run in turn, each as a new process:

    jax       python -c "import jax; jax.devices()"
    first     alignvlm ask, with an empty cache
    second    the same command again, with the cache that the first one has left

The ratios are medians of the rounds. Other programs on the machine distort wall time more than processor time (user
and system), so both are printed. If libtpu is installed, JAX also searches for a TPU; `--jax-platforms cpu` starts it
as `alignvlm` does on a machine without accelerators.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alignvlm_jax.data.synthetic.document import draw_document

QUESTION = "What is the total?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="number of rounds (default: 7)")
    parser.add_argument("--jax-platforms", metavar="NAME", help="value of JAX_PLATFORMS for all commands")


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="startup_") as folder:
        page = Path(folder) / "page.png"
        draw_document(1, "heldout", 3, family="receipt").image.save(page)
        times = _measure(args, page, folder)
    figures = {"rounds": args.rounds, "jax_platforms": args.jax_platforms}
    print("             wall     processor   ratio of wall   ratio of processor time")
    for name, rows in times.items():
        wall, processor = (statistics.median(column) for column in zip(*rows, strict=True))
        base_wall, base_processor = (statistics.median(column) for column in zip(*times["jax"], strict=True))
        ratios = wall / base_wall, processor / base_processor
        figures[name] = dict(wall=wall, processor=processor, wall_ratio=ratios[0], processor_ratio=ratios[1], runs=rows)
        print(f"{name:10s} {wall:5.2f} s    {processor:5.2f} s   {ratios[0]:8.2f} {ratios[1]:20.2f}")
    return figures


def _measure(args: argparse.Namespace, page: Path, folder: str) -> dict[str, list[tuple[float, float]]]:
    """Returns wall and processor seconds of every run, by the name of the command."""
    # A cache of JAX's own would serve the first command, too.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    if args.jax_platforms:
        environment["JAX_PLATFORMS"] = args.jax_platforms
    ask = [sys.executable, "-m", "alignvlm_jax", "ask", "--checkpoint", "nano", str(page), "--question", QUESTION]
    jax = [sys.executable, "-c", "import jax; jax.devices()"]
    times = {"jax": [], "first": [], "second": []}
    for index in range(args.rounds):
        environment["ALIGNVLM_CACHE"] = f"{folder}/{index}"
        for name, command in (("jax", jax), ("first", ask), ("second", ask)):
            times[name].append(_run(command, environment))
    return times


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
