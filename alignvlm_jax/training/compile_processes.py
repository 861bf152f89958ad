"""Compiles the candidates of a search, one process for each, and stores their reports in a folder.

`compile_candidates.py` and `compile_search.py` decide what to compile. A program is compiled by `alignvlm compile`, so
that each result can be repeated with one command. Its report is stored under a name that depends on the command, the
config, the package's source and the versions of the compiler. An interrupted search continues with the stored reports.
"""

import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import alignvlm_jax
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_hash
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.models import rematerialization
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import ahead_of_time
from alignvlm_jax.training.compile_candidates import Candidate, Space
from alignvlm_jax.training.compile_search import LOW, Report
from alignvlm_jax.training.train_step import abstract_state

PACKAGE = Path(alignvlm_jax.__file__).parent

REMAT = tuple(dict.fromkeys(candidate.language for candidate in rematerialization.CANDIDATES))
"""The recomputation of the decoder that a search tries, in the order of `auto`."""

_REPORTED = (0, 3, 4)  # exit codes of `alignvlm compile` with a report


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


def identity(experiment: ExperimentConfig) -> str:
    """Returns a text that changes with the config, the source of the package and the compiler."""
    source = hashlib.sha256()
    for folder in ("config", "models", "ops", "parallel", "training"):
        for file in sorted((PACKAGE / folder).rglob("*.py")):
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
    process = [sys.executable, "-m", "alignvlm_jax", "compile", *command, "--json", str(part)]
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
