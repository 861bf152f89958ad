"""`alignvlm compile`: output, report and exit codes for real steps compiled by libtpu, without a TPU.

The tests use low compiler effort, which takes a fifth of the time. The programs are the same, with worse schedules.
`make test-tpu` compiles the full models with normal effort.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm_jax import cli
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import topology
from alignvlm_jax.parallel.topology import has_compiler
from alignvlm_jax.training import ahead_of_time

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not has_compiler(), reason="libtpu is only available for Linux on x86")

FAST = ("--optimization-level", "O0")
TWO_LAYERS = (
    # Random weights may have other sizes than those of the named model.
    "--config.backbones.vision=random:siglip-so400m-patch14-384",
    "--config.backbones.language=random:llama-3.1-8b",
    "--config.model.language.num_layers=2",
    "--config.model.vision.num_layers=2",
    "--config.data.packing.tokens_per_bin=1024",
    "--config.data.packing.tiles_per_bin=1",
)


def compile_step(*arguments):
    environment = {**os.environ, "XLA_FLAGS": "", "NPROC": ""}
    command = [sys.executable, "-m", "alignvlm_jax", "compile", *FAST, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


@pytest.mark.large
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_nano_model_trains_on_a_slice(tmp_path, topology):
    file = tmp_path / "report.json"
    done = compile_step("--config", "configs/nano.py", "--topology", topology, "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["fits"] and 0 < report["per_chip_bytes"] < report["capacity_bytes"]
    assert report["flops"] == pytest.approx(sum(report["flops_by_part"].values()))
    assert report["compile_seconds"] > 0 and report["num_chips"] == 4
    assert report["attention"] == {"encoder": "splash", "decoder": "splash"}
    # data=4: the gradients are summed over the slice, and nothing leaves it.
    assert report["collectives"]["all-reduce"]["ici"] > 0
    assert report["collective_bytes"] == pytest.approx(sum(w["ici"] for w in report["collectives"].values()))
    assert "8 bins (2 x 4) of 8 full pages" in done.stdout and "attention: encoder splash" in done.stdout
    assert "memory per chip" in done.stdout and "ESTIMATE" in done.stdout


def test_a_model_that_does_not_fit_is_reported_with_advice(tmp_path):
    file = tmp_path / "report.json"
    words = "--config.model.language.vocab_size=16000000"  # A table of 8.2 GB, and its optimizer state.
    done = compile_step("--config", "configs/nano.py", "--topology", "v5e:2x2", words, "--json", str(file))
    assert done.returncode == 3, done.stderr
    report = json.loads(file.read_text())
    assert not report["fits"] and "DOES NOT FIT" in done.stdout
    assert report["memory"]["parameters"] + report["memory"]["optimizer"] > report["capacity_bytes"]
    assert report["advice"] and "largest buffers" in done.stdout


def test_two_layers_of_the_8b_model_fit_four_chips(tmp_path):
    file, text = tmp_path / "report.json", tmp_path / "program.txt"
    files = ("--json", str(file), "--text", str(text))
    done = compile_step("--config", "configs/alignvlm_8b.py", "--topology", "v5e:2x2", *files, *TWO_LAYERS)
    assert done.returncode == 0, done.stderr
    assert text.read_text().startswith("HloModule jit_train_step")
    report = json.loads(file.read_text())
    # 2.05 billion float32 weights of two layers and three tables of words, and twice that for Adam, over four chips.
    assert report["memory"]["optimizer"] == pytest.approx(2 * report["memory"]["parameters"], rel=1e-3)
    # Each bin has 729 visual and 295 text tokens. The executed products are those of the model and the recomputed ones:
    # more than the formula, and less than twice as many.
    assert 1 < report["executed_flops_per_chip"] * 4 / report["flops"] < 2


@pytest.mark.large
def test_the_decoder_alone_trains_on_a_slice(tmp_path):
    file = tmp_path / "report.json"
    rows = ("--text-only", "--length", "512", "--rows-per-device", "2")
    done = compile_step("--config", "configs/nano.py", "--topology", "v5e:2x2", *rows, "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["attention"] == {"decoder": "splash"} and report["trainable"] == ["language"]
    assert report["tokens"] == 8 * 512 and "8 rows of text: 4,096 tokens" in done.stdout


def test_the_length_of_text_is_passed_on(monkeypatch):
    lengths = []

    def compile_train_step(*arguments, text_length, **options):
        lengths.append(text_length)
        raise UserError("this is enough")

    monkeypatch.setattr(topology, "topology_devices", lambda *arguments, **options: [])
    monkeypatch.setattr(ahead_of_time, "compile_train_step", compile_train_step)
    arguments = ["compile", "--config", "configs/nano.py", "--topology", "v5e:2x2"]
    assert cli.main([*arguments, "--text-only", "--length", "512"]) == 2
    assert cli.main(arguments) == 2
    assert lengths == [512, None]
    tree = "--config.data.group_questions=tree"
    for wrong in (
        ["--text-only"],
        ["--length", "512"],
        ["--text-only", "--length", "512", "--decode"],
        ["--questions", "4"],
        ["--questions", "4", tree, "--decode"],
    ):
        assert cli.main([*arguments, *wrong]) == 2
    assert len(lengths) == 2


@pytest.mark.large
def test_decoding_compiles(tmp_path):
    file = tmp_path / "report.json"
    done = compile_step("--config", "configs/nano.py", "--topology", "v5e:2x2", "--decode", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["prefill"]["fits"] and report["decode"]["fits"]
    assert report["decode"]["executed_flops_per_chip"] < report["prefill"]["executed_flops_per_chip"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--topology", "v5e"), "expected a generation and a shape"),
        (("--topology", "v99:2x2"), "v99:2x2: unknown to libtpu"),
        (("--topology", "v5e:2x2", "--stage", "9"), "has stages 1 to 3"),
        (("--topology", "v5e:2x2", "--mesh", "data=3"), "does not fit 4 device"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(arguments, message, capsys):
    assert cli.main(["compile", "--config", "configs/nano.py", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
