"""Tests of the benchmark tool at small sizes: it runs and writes its figures."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tools.benchmarks import answers, decode, startup, trees

ROOT = pathlib.Path(__file__).resolve().parents[2]


def benchmark(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tools" / "benchmark.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_figures_and_plot(tmp_path):
    done = benchmark(
        *["vocab", "--quick", "--parts", "memory"],
        *["--json", tmp_path / "figures.json", "--plot", tmp_path / "memory.svg"],
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert pathlib.Path(figures["package"]) == ROOT / "alignvlm_jax"
    for dense, streaming in zip(figures["memory"]["dense"], figures["memory"]["streaming"], strict=True):
        assert 0 < streaming < dense
    assert "<svg" in (tmp_path / "memory.svg").read_text()


def test_training(tmp_path):
    done = benchmark("train", "--quick", "--peer", "none", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["quick"]
    assert figures["pages"] == 8 and figures["tokens_per_second"]["ours"] > 0


def test_training_with_trees():
    figures = trees.run(argparse.Namespace(quick=True))["quick"]
    assert figures["flops_per_answer"]["tree"] < figures["flops_per_answer"]["alone"] / 3
    assert all(rate > 0 for rate in figures["answers_per_second"].values()) and figures["ceiling"] > 0


@pytest.mark.large
def test_startup():
    figures = startup.run(argparse.Namespace(rounds=1, jax_platforms="cpu"))
    assert figures["second"]["processor"] < figures["first"]["processor"]


@pytest.mark.large
def test_training_starts_from_the_same_loss_as_pytorch(tmp_path):
    done = benchmark("train", "--quick", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["quick"]
    assert figures["first_loss"]["ours"] == pytest.approx(figures["first_loss"]["torch"], rel=1e-5)
    assert figures["ratio"] > 0


def test_images_into_tiles(tmp_path):
    done = benchmark("data", "--quick", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["LLaVA-OneVision"]["tiles"] == [7, 5] and figures["Idefics3"]["tiles"] == [13, 13]
    for model in ("LLaVA-OneVision", "Idefics3"):
        rates = figures[model]["tiles_per_second_and_core"]
        assert {"theirs, PIL", "ours", "ours + float32"} <= set(rates)
        assert all(rate["from_files"] > 0 for rate in rates.values())


def test_answers_are_the_same_alone_and_with_shared_pages():
    options = dict(checkpoint="nano", pages=1, batch_size=4, max_new_tokens=1, rounds=1)
    figures = answers.run(argparse.Namespace(quick=True, **options))["own"]
    assert figures["questions"] == 3 and figures["different_answers"] == 0
    for contender in ("alone", "shared"):
        assert figures[contender]["questions_per_second"] > 0
        assert sum(figures[contender]["shares"].values()) == pytest.approx(1)


def test_decoding_without_a_peer_draws_random_weights(monkeypatch):
    monkeypatch.setattr(decode, "Decode", lambda config, params, tokens, num_tokens: None)
    monkeypatch.setattr(decode, "compare", lambda what, contenders, num_tokens, rounds: contenders["ours"])
    figures = decode.run(argparse.Namespace(quick=True, rounds=1, peer="none", model=None, prompt=20))
    assert 0 <= figures["prefill"]() < decode.QUICK["vocab_size"]


def test_decoding_gives_the_tokens_of_transformers():
    figures = decode.run(argparse.Namespace(quick=True, rounds=1, peer="transformers", model=None, prompt=20))
    contenders = [result for what in ("prefill", "decode batch 2") for result in figures[what].values()]
    compared = [result for result in contenders if isinstance(result, dict)]
    assert len(compared) == 5
    assert all(result["same_tokens"] == 1 and result["tokens_per_second"] > 0 for result in compared)
