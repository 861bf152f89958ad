"""tools/gpu_check.py with tiny shapes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm_jax.config import load_config

TOOLS = Path(__file__).parents[2] / "tools"
# What a machine with only jax and flax lacks.
MISSING = ["array_record", "grain", "jaxtyping", "jinja2", "ml_collections", "PIL", "tensorflow_datasets", "tokenizers"]
PROGRAM = f"""
import runpy, sys
sys.modules |= dict.fromkeys({MISSING!r})  # importing one of them fails
sys.path.insert(0, {str(TOOLS)!r})
sys.argv[0] = "gpu_check.py"
runpy.run_path({str(TOOLS / "gpu_check.py")!r}, run_name="__main__")
"""


def run(file, *arguments):
    command = [sys.executable, "-c", PROGRAM, "--tiny", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_it_runs_with_jax_and_flax_alone_and_writes_its_figures(tmp_path):
    figures, output = run(tmp_path / "gpu.json", "--parts", "matmul")
    assert list(figures) == ["environment", "matmul"] and figures["environment"]["device"] == "cpu"
    assert figures["matmul"]["tflops"] > 0 and "tflops" in output
    assert list(tmp_path.iterdir()) == [tmp_path / "gpu.json"]


@pytest.mark.large
def test_every_part_runs_without_errors(tmp_path):
    figures, _ = run(tmp_path / "gpu.json")
    assert list(figures) == ["environment", "matmul", "align", "attention", "train_1b", "frozen_8b", "train_1b_kept"]
    assert not [name for part in figures.values() for name in part if name.endswith("error")]
    assert figures["align"]["ours_of_matmul_rate"] > 0 and figures["attention"]["xla_forward_ms"] > 0
    assert figures["train_1b"]["needed_tflop"] > figures["frozen_8b"]["needed_tflop"] > 0
    assert figures["train_1b"]["step_s"] > 0 and figures["train_1b"]["loss"] > 0


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import gpu_check

    return gpu_check


def test_the_models_are_those_of_the_configs(gpu_check):
    assert gpu_check.REAL.model_1b == load_config("configs/alignvlm_1b.py").model
    assert gpu_check.REAL.model_8b == load_config("configs/alignvlm_8b.py").model


def test_a_part_that_fails_or_has_no_time_left_does_not_stop_the_others(gpu_check, tmp_path):
    file = tmp_path / "gpu.json"
    report = gpu_check.Report(file, minutes=1)

    def fail():
        raise RuntimeError("out of memory\nmore")

    report.run("first", fail, 0)
    report.run("second", fail, 61)
    report.run("third", lambda: report.add("third", figure=1 / 3), 0)
    figures = json.loads(file.read_text())
    assert figures["first"]["error"] == "RuntimeError: out of memory more"
    assert figures["second"] == {"skipped": "less than 61 s were left"}
    assert figures["third"]["figure"] == 0.3333
