"""The search of compile_tpu.py: a process for each program, finished reports in a folder, and the best as overrides.

`alignvlm_jax/training/compile_candidates.py` and `compile_search.py` decide what to compile. A program is compiled by
compile_tpu.py itself, so that each result can be repeated with one command. Its report is stored under a name that
depends on the command, the config, the package's source and the versions of the compiler. An interrupted search takes
the stored reports and goes on.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_hash
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import rematerialization
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh, parse_mesh
from alignvlm_jax.training import ahead_of_time
from alignvlm_jax.training.compile_candidates import (
    Candidate,
    Space,
    candidates,
    lower_bound,
    rank,
    seconds_per_example,
)
from alignvlm_jax.training.compile_search import LOW, Report, best, search, table
from alignvlm_jax.training.train_step import abstract_state

ROOT = Path(__file__).parents[1]
REMAT = tuple(dict.fromkeys(candidate.language for candidate in rematerialization.CANDIDATES))
_REPORTED = (0, 3, 4)  # exit codes of compile_tpu.py with a report


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--search", action="store_true", help="find the fastest training step that fits")
    group.add_argument("--minutes", type=float, default=60, metavar="M", help="time limit of the search (default: 60)")
    group.add_argument(
        "--candidates",
        type=int,
        default=12,
        metavar="N",
        help="programs to compile at low effort; 0 lists them (default: 12)",
    )
    group.add_argument("--finalists", type=int, default=2, metavar="N", help="programs at full effort (default: 2)")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="programs at the same time (default: 1)")
    group.add_argument(
        "--remat",
        action="append",
        metavar="NAMES",
        help=f"decoder's remat (default: {' '.join(REMAT)})",
    )
    group.add_argument(
        "--vision-remat", action="append", metavar="NAMES", help="encoder's remat (default: the config's)"
    )
    group.add_argument(
        "--rows", type=_numbers, default=(1, 2, 4), metavar="N,N", help="bins per device (default: 1,2,4)"
    )
    group.add_argument(
        "--pages", type=_numbers, default=(), metavar="N,N", help="pages per bin (default: the config's)"
    )
    group.add_argument(
        "--search-dir", type=Path, default=ROOT / "build" / "tpu_search", metavar="DIR", help="stored reports"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def run(
    args: argparse.Namespace, overrides: Sequence[str], experiment: ExperimentConfig, devices: Sequence[jax.Device]
) -> int:
    """Searches, prints the table and stores the best as overrides; returns an exit code."""
    space = make_space(experiment, devices, args.stage - 1, args.slices)
    found = candidates(
        space,
        policies=args.remat or REMAT,
        vision_policies=args.vision_remat,
        rows=args.rows,
        pages=args.pages,
        meshes=[_sizes(text, len(devices)) for text in args.mesh or ()] or None,
    )
    if not found:
        raise UserError("--search: no candidate divides the model, the bins and the devices evenly and may fit")
    ranked = rank(space, found)
    _log(f"{len(ranked)} candidates may fit")
    for candidate in ranked[: args.candidates or None]:
        seconds, bound = seconds_per_example(space, candidate), lower_bound(space, candidate) / 1e9
        _log(f"  at least {bound:5.2f} GB, about {1e3 * seconds:6.1f} ms a page  {candidate.describe()}")
    if not args.candidates:
        return 0

    common = ["--config", str(args.config), "--topology", args.topology, "--slices", str(args.slices)]
    common += ["--stage", str(args.stage), *(f"--config.{override}" for override in overrides)]
    outcomes = search(
        ranked,
        functools.partial(compile_program, common, args.search_dir, identity(experiment)),
        minutes=args.minutes,
        num_candidates=args.candidates,
        num_finalists=args.finalists,
        jobs=args.jobs,
        log=_log,
    )
    print(table(outcomes))
    winner = best(outcomes)
    if winner is None:
        print("no program fits")
        return 3
    lines = [f"--config.{override}" for override in winner.candidate.overrides()]
    file = args.search_dir / f"{Path(args.config).stem}-stage{args.stage}-{args.topology.replace(':', '-')}.overrides"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\nbest, at " + winner.effort + " effort:", *lines, sep="\n  ")
    print(f"written to {file}; use it as: alignvlm train --config {args.config} $(cat {file})")
    return 0


def make_space(experiment: ExperimentConfig, devices: Sequence[jax.Device], stage_index: int, slices: int) -> Space:
    """Returns the settings that all candidates share."""
    chip, _ = ahead_of_time.find_chips(devices)
    stage = ahead_of_time.compilable_stage(experiment, stage_index)
    model = ahead_of_time.resolve(experiment.model, devices[0])
    measure = functools.cache(functools.partial(state_bytes, model, stage, devices, slices))
    return Space(experiment, stage, chip, len(devices), slices, ahead_of_time.capacity_bytes(chip), measure)


def state_bytes(
    model: AlignVLMConfig, stage: StageConfig, devices: Sequence[jax.Device], slices: int, *sizes: int
) -> tuple[int, int, int]:
    """Returns the bytes per device of trained weights, all weights and the optimizer's state, for sizes of the mesh."""
    state = abstract_state(model, stage, make_mesh(MeshConfig(*sizes), devices, slices=slices))
    trained = {part: state.params[part] for part in stage.trainable}
    return tuple(ahead_of_time.bytes_per_device(tree) for tree in (trained, state.params, state.opt_state))


def _sizes(text: str, num_devices: int) -> tuple[int, int, int]:
    mesh = parse_mesh(text)
    if mesh.data * mesh.fsdp * mesh.tensor != num_devices:
        raise UserError(f"--mesh {text}: the sizes must multiply to {num_devices}")
    return mesh.data, mesh.fsdp, mesh.tensor


def identity(experiment: ExperimentConfig) -> str:
    """Returns a text that changes with the config, the source of the package and the compiler."""
    source = hashlib.sha256()
    for folder in ("config", "models", "ops", "parallel", "training"):
        for file in sorted((ROOT / "alignvlm_jax" / folder).rglob("*.py")):
            source.update(file.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu", "flax")]
    return " ".join([config_hash(experiment), source.hexdigest(), *versions])


def compile_program(
    common: Sequence[str], folder: Path, identity: str, candidate: Candidate, effort: str, seconds: float
) -> Report | None:
    """Returns the stored report of a program, or compiles it in a process; None if the time was not enough."""
    command = [*common, "--rows-per-device", str(candidate.rows)]
    command += [f"--config.{override}" for override in candidate.overrides()]
    command += ["--optimization-level", "O0"] if effort == LOW else []
    name = hashlib.sha256(" ".join([*command, identity]).encode()).hexdigest()[:16]
    file, part = folder / f"{name}.json", folder / f"{name}.part"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    process = [sys.executable, str(ROOT / "tools" / "compile_tpu.py"), *command, "--json", str(part)]
    try:
        done = subprocess.run(process, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in _REPORTED:
        # A compiler that crashes writes a long trace: the first line that names an error says most.
        lines = [line for line in done.stderr.splitlines() if "rror" in line or "failed" in line] or ["no message"]
        return {"error": f"exit code {done.returncode}: {lines[0][:300]}"}
    # A report has its final name only when it is complete.
    part.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
