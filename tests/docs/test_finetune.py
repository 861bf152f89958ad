"""Runs the blocks of docs/finetune.md as they are printed, with less data and fewer steps."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import alignvlm_jax
from alignvlm_jax import cli
from alignvlm_jax.config import load_config
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.training.experiment_data import ExperimentData
from tests.built_package import ROOT, build_package

TUTORIAL = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")

# Text of the tutorial -> its replacement in the test.
SMALLER = {"make_tags.py 400": "make_tags.py 40", "config.steps=60": "config.steps=2"}


def blocks() -> list[tuple[str, str]]:
    """Returns the blocks in order: ("make_tags.py", content) for a file to save, ("", commands) for a shell block."""
    text = TUTORIAL
    for large, small in SMALLER.items():
        assert large in text
        text = text.replace(large, small)
    matches = re.findall(r'^```(?:python title="(\S+)"|bash)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    # The others show an environment, two tables of scores, and what needs a large machine.
    assert len(matches) == 8 and text.count("```") == 2 * (len(matches) + 4)
    return matches


def shell(commands: str, folder: pathlib.Path, programs: pathlib.Path | None = None) -> str:
    """Runs commands in a folder, with the programs of an environment (by default this one); returns what they print."""
    path = f"{programs or pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": "" if programs else str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_data_and_configs_are_ready_for_training(tmp_path, monkeypatch):
    """Runs steps 1 to 3, and makes the first batch that training would use."""
    monkeypatch.chdir(tmp_path)
    for file, text in blocks():
        if file:
            (tmp_path / file).write_text(text)
        elif "make_tags" in text:
            shell(text, tmp_path)
        elif "alignvlm prepare" in text or "alignvlm import" in text:
            for command in text.splitlines():  # in this process, which has imported the package already
                assert cli.main(shlex.split(command)[1:]) == 0
        elif "alignvlm train" in text:
            train = cli.parse(shlex.split(text.replace("\\\n", " "))[1:])
    lines = [json.loads(line) for line in (tmp_path / "tags" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and not (tmp_path / "data" / "tags" / "rejects.jsonl").read_text()

    config = load_config(train.config, [*train.overrides, f"init_from={train.init_from}"])
    (stage,) = config.stages
    data = ExperimentData(config)
    plan = data.plan(0, stage)
    assert plan.steps == 2
    batches = data.batches(0, stage, plan, None, range(config.data.packing.bins_per_microbatch))
    try:
        batch = next(batches)
    finally:
        batches.close()
    assert batch["num_refused"].sum() == 0 and batch["num_examples"].sum() >= 8
    assert batch["loss_weights"].sum() > 0
    # A page of 80 x 80 pixels is one tile of 10 x 10 visual tokens.
    assert (batch["visual_index"] >= 0).sum() == 100 * batch["num_examples"].sum()

    mixed = load_config(tmp_path / "tags_mixed.py")
    assert [part.dataset for part in mixed.stages[0].mixture] == ["tags", "docdownstream"]


@pytest.mark.large
def test_all_five_steps_run_from_the_wheel(tmp_path):
    """In an empty folder, in a new environment of uv with the wheel and nothing else: no clone, no torch."""
    _, wheel = build_package(tmp_path / "dist")
    environment, uv = tmp_path / "environment", pathlib.Path(sys.executable).parent / "uv"
    shell(f"{uv} venv --python {sys.executable} {environment}", tmp_path)
    shell(f"{uv} pip install --python {environment} {wheel}", tmp_path)
    tmp_path = tmp_path / "empty"
    tmp_path.mkdir()
    programs, printed = environment / "bin", []
    where = shell("python -c 'import alignvlm_jax; print(alignvlm_jax.__file__)'", tmp_path, programs)
    assert where.startswith(str(environment))
    for file, text in blocks():
        if file:
            (tmp_path / file).write_text(text)
        else:
            printed.append(shell(text, tmp_path, programs))
    for scores in (printed[3], printed[-1]):  # before and after training
        assert re.search(r"^all +6  \d\.\d\d \[.* \d\.\d\d \[", scores, re.MULTILINE)
    assert "exact match 0." in printed[4] and "expected  " in printed[-1]
    assert (tmp_path / "tags-pytorch" / "model.safetensors").is_file()


@pytest.mark.large
def test_the_wheel_answers_without_being_installed(tmp_path):
    """`uvx` makes an environment of its own, in its cache."""
    _, wheel = build_package(tmp_path / "dist")
    (record,) = draw_records(0, "heldout", 0, 1)
    (tmp_path / "page.png").write_bytes(record["image"])
    question, programs = record["questions"][0], pathlib.Path(sys.executable).parent
    command = f"uvx --python {sys.executable} --from {wheel.parent}/*.whl alignvlm ask --checkpoint nano page.png"
    printed = shell(f'{command} --question "{question}"', tmp_path, programs)
    assert printed == f"{alignvlm_jax.load('nano').ask(tmp_path / 'page.png', question)}\n"
