"""The search of `alignvlm compile`: stored reports, and a real search for a tiny model."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignvlm_jax.config import load_config
from alignvlm_jax.parallel.chips import TPU_V5E
from alignvlm_jax.parallel.topology import has_compiler
from alignvlm_jax.training import ahead_of_time, compile_processes
from alignvlm_jax.training.compile_candidates import Candidate, Space, lower_bound
from alignvlm_jax.training.compile_search import FULL, LOW

CANDIDATE = Candidate(1, 4, 1, 1, "full", "full", 1024, 10)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def processes(monkeypatch):
    """List of the commands that would run, and a result for each: (exit code, stderr, or "slow")."""
    commands, results = [], []

    def run(command, *, timeout, **options):
        commands.append(command)
        code, stderr = results.pop(0)
        if stderr == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        if code in (0, 3, 4):
            Path(command[-1]).write_text(json.dumps({"fits": code != 3}))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(compile_processes.subprocess, "run", run)
    return commands, results


def compile_program(folder, effort=LOW, candidate=CANDIDATE, identity="a"):
    return compile_processes.compile_program(["--config", "nano.py"], folder, identity, candidate, effort, 60.0)


def test_the_decoder_is_tried_with_every_recomputation_that_auto_tries():
    assert compile_processes.REMAT[0] == "none" and compile_processes.REMAT[-1] == "full"
    assert "attention_out,qkv" in compile_processes.REMAT and len(set(compile_processes.REMAT)) == len(
        compile_processes.REMAT
    )


def test_a_finished_program_is_not_compiled_again(tmp_path, processes):
    commands, results = processes
    results += [(0, ""), (3, ""), (0, "")]
    assert compile_program(tmp_path) == {"fits": True} and compile_program(tmp_path) == {"fits": True}
    assert len(commands) == 1 and "O0" in commands[0] and "--config.mesh.fsdp=4" in commands[0]
    # Another effort, or another source of the package, is another program.
    assert compile_program(tmp_path, FULL) == {"fits": False} and "O0" not in commands[1]
    assert compile_program(tmp_path, identity="b") == {"fits": True}
    assert len(commands) == 3


def test_an_unfinished_program_is_compiled_again(tmp_path, processes):
    commands, results = processes
    results += [(0, "slow"), (-6, "F1130 check.cc: Check failed: a < b\nstack"), (0, "")]
    assert compile_program(tmp_path) is None
    assert compile_program(tmp_path) == {"error": "exit code -6: F1130 check.cc: Check failed: a < b"}
    assert compile_program(tmp_path) == {"fits": True}
    assert len(commands) == 3


def test_the_identity_depends_on_the_config_and_the_source(tmp_path, monkeypatch):
    one, other = (load_config("configs/nano.py", [f"seed={seed}"]) for seed in (1, 2))
    assert compile_processes.identity(one) == compile_processes.identity(one) != compile_processes.identity(other)
    before = compile_processes.identity(one)
    monkeypatch.setattr(compile_processes, "PACKAGE", tmp_path)
    assert compile_processes.identity(one) != before


def test_the_lower_bound_is_below_the_compilers_figure_and_above_a_third_of_it():
    # The 1B model on eight chips, as in docs/tpu.md.
    row = json.loads((ROOT / "docs" / "tpu" / "1b-stage1-v5e-2x4.json").read_text())
    experiment = load_config("configs/alignvlm_1b.py")
    stage = ahead_of_time.compilable_stage(experiment, 0)

    @functools.cache
    def state_bytes(*sizes):
        return compile_processes.state_bytes(experiment.model, stage, jax.devices(), 1, *sizes)

    space = Space(experiment, stage, TPU_V5E, 8, 1, ahead_of_time.capacity_bytes(TPU_V5E), state_bytes)
    policy = experiment.model.language.remat
    bound = lower_bound(space, Candidate(*row["mesh"].values(), 1, policy, policy, 14848, 20))
    state = row["memory"]["parameters"] + row["memory"]["optimizer"]
    assert state_bytes(*row["mesh"].values())[1:] == (row["memory"]["parameters"], row["memory"]["optimizer"])
    assert state < row["per_chip_bytes"] / 3 < bound < row["per_chip_bytes"]


@pytest.mark.large
@pytest.mark.skipif(not has_compiler(), reason="libtpu is only available for Linux on x86")
def test_a_search_for_a_tiny_model_finds_what_fits(tmp_path):
    command = [sys.executable, "-m", "alignvlm_jax", "compile", "--config", "configs/nano.py"]
    command += ["--topology", "v5e:2x2", "--search", "--mesh", "data=4", "--mesh", "data=2,fsdp=2", "--rows", "1"]
    command += ["--remat", "full", "--remat", "none", "--finalists", "1", "--search-dir", str(tmp_path)]
    runs = [subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200) for _ in range(2)]
    for done in runs:
        assert done.returncode == 0, done.stderr
        assert done.stdout == runs[0].stdout  # the second search takes the stored reports
    reports = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(reports) == 3 and all(report["fits"] for report in reports.values())
    assert "remat=full" in runs[0].stderr and "skipped" in runs[0].stderr
    (file,) = tmp_path.glob("*.overrides")
    assert file.name == "nano-stage1-v5e-2x2.overrides"
    assert load_config("configs/nano.py", file.read_text().split()).model.language.remat == "none"
