"""Tests of the demo from end to end with a tiny model and few documents, then of `ask` and `eval` on its checkpoint."""

import dataclasses
import json
import pathlib
import shutil

import jax
import PIL.Image
import pytest
from flax import linen as nn

from alignvlm_jax import cli, demo
from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.interop import huggingface
from alignvlm_jax.leases.lease import InUseError
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.models.alignvlm import random_parameters
from tests.data.nano_tokenizer import write_chat_folder

SIZES = {"train": 24, "validation": 8, "heldout": 24}
TINY = [
    "data.packing.bins_per_microbatch=8",
    "data.packing.tokens_per_bin=256",
    "model.vision.patch_size=20",
    "model.vision.hidden_size=16",
    "model.vision.intermediate_size=16",
    "model.vision.num_layers=1",
    "model.vision.num_heads=2",
    "model.language.hidden_size=16",
    "model.language.intermediate_size=16",
    "model.language.num_layers=1",
    "model.language.num_heads=2",
    "model.language.num_kv_heads=1",
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> ExperimentConfig:
    """configs/nano.py reduced to its last stage, with a tiny model and random backbones."""
    folder = tmp_path_factory.mktemp("backbones")
    backbones = [f"backbones.{part}={folder / part}" for part in ("vision", "language")]
    nano = load_config("configs/nano.py", [*TINY, *backbones])
    stage = dataclasses.replace(nano.stages[-1], steps=2, warmup_steps=0, global_batch=8)
    tiny = dataclasses.replace(nano, stages=(stage,))
    params = nn.unbox(jax.jit(lambda rng: random_parameters(tiny.model, rng))(jax.random.key(0)))
    huggingface.save_vision_folder(folder / "vision", tiny.model.vision, params["vision"])
    huggingface.save_language_folder(folder / "language", tiny.model.language, params["language"])
    write_chat_folder(folder / "language")
    return tiny


@pytest.fixture(scope="module")
def out(experiment, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    demo.run(experiment, folder, sizes=SIZES)
    return folder


def test_results_are_complete_and_consistent(out):
    results = json.loads((out / "results.json").read_text())
    for name in ("exact_match", "before_exact_match", "blank_image_exact_match", "wrong_image_exact_match"):
        assert 0 <= results[name] <= 1
    assert results["train_seconds"] > 0
    assert set(results["per_family"]) <= {"receipt", "form", "table", "chart"}
    assert results["num_questions"] >= 3 * SIZES["heldout"]
    assert results["config"]["model"]["connector"]["name"] == "align"
    answers = [json.loads(line) for line in (out / "evaluation" / "heldout.jsonl").read_text().splitlines()]
    assert sum(answer["right"] for answer in answers) == results["evaluations"]["heldout"]["num_right"]


def test_a_second_demo_in_the_same_folder_is_refused(experiment, tmp_path):
    with one_writer(tmp_path), pytest.raises(InUseError, match="another run is writing to it"):
        demo.run(experiment, tmp_path, sizes=SIZES)
    assert not list(tmp_path.iterdir())


def test_running_the_demo_again_repeats_nothing(out, experiment, capsys):
    results = [*out.glob("evaluation/*"), *out.glob("checkpoint/checkpoints/*/params"), *out.glob("data/documents/*")]
    before = {file: file.stat().st_mtime_ns for file in results}
    demo.run(experiment, out, sizes=SIZES)
    assert {file: file.stat().st_mtime_ns for file in results} == before
    printed = capsys.readouterr().out
    assert f"alignvlm ask --checkpoint {out / 'checkpoint'}" in printed
    assert "another page" in printed and "font not trained" in printed


def test_ask_answers_with_the_checkpoint(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert PIL.Image.open(out / "example_large.png").width > PIL.Image.open(out / "example.png").width
    argv = ["ask", "--checkpoint", str(out / "checkpoint"), str(out / "example.png"), "--max-new-tokens", "4"]
    assert cli.main([*argv, "--question", "What is the total?"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") >= 1
    # The run has recorded the scale of its pages, and that its connector is trained.
    assert json.loads((out / "checkpoint" / "pages.json").read_text()) == {"scale": 1.0}
    assert "never trained" not in printed.err and "of its size" not in printed.err


def test_eval_scores_the_checkpoint(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["eval", "--checkpoint", str(out / "checkpoint"), "--split", "validation", "--limit", "10"]
    assert cli.main([*argv, "--json", "scores.json", "--predictions", "answers.jsonl"]) == 0
    assert json.loads(pathlib.Path("scores.json").read_text())["num_questions"] == 10
    assert len(pathlib.Path("answers.jsonl").read_text().splitlines()) == 10
    assert "exact match" in capsys.readouterr().out
    assert cli.main([*argv[:3], "--data", str(out)]) == 2
    assert "is not a data set" in capsys.readouterr().err


def test_missing_data_is_reported(out, tmp_path, capsys):
    shutil.copytree(out / "checkpoint", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    raw = json.loads(file.read_text())
    raw["data"]["root"] = "no/such/place"
    file.write_text(json.dumps(raw))
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "run")]) == 2
    assert "--data" in capsys.readouterr().err
