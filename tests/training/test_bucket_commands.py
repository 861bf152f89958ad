"""The commands train, eval, ask and export, with the data set, the run and all outputs in a bucket."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest
from etils import epath

from alignvlm_jax import cli
from tests import fault_proxy
from tests.data.pages import pages
from tests.parallel import processes
from tests.training import test_preemption


def copy_folder(source, target) -> None:
    """Copies a folder from a disk to a bucket, or back."""
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(config: pathlib.Path, bucket: str, *options: str) -> subprocess.CompletedProcess:
    """Runs `alignvlm train` in the folder of the config."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "PYTHONPATH": str(processes.ROOT),
    }
    arguments = ["train", "--config", str(config), "--workdir", f"{bucket}/run", *options]
    command = [sys.executable, "-m", "alignvlm_jax", *arguments]
    return subprocess.run(command, env=environment, cwd=config.parent, capture_output=True, text=True)


@pytest.mark.large
def test_a_run_in_a_bucket_is_trained_scored_asked_and_exported_there(tmp_path, gcs_bucket, monkeypatch, capsys):
    monkeypatch.setattr(test_preemption, "STEPS", 3)
    config = test_preemption.write_config(tmp_path)
    copy_folder(tmp_path / "documents", epath.Path(gcs_bucket) / "data" / "documents")
    run = train(config, gcs_bucket, f"--config.data.root={gcs_bucket}/data")
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.py", "documents", "tokenizer"}, "nothing else on disk"

    # The same commands on a copy of the run on a disk give the same results.
    copy_folder(epath.Path(gcs_bucket) / "run", tmp_path / "run")
    (tmp_path / "page.png").write_bytes(pages(1)[0]["image"])
    answers, scores = [], []
    for checkpoint, data, output in (
        (f"{gcs_bucket}/run", f"{gcs_bucket}/data/documents", epath.Path(gcs_bucket) / "out"),
        (str(tmp_path / "run"), str(tmp_path / "documents"), tmp_path / "out"),
    ):
        question = ["--question", "What is the total?", "--max-new-tokens", "5"]
        assert cli.main(["ask", "--checkpoint", checkpoint, str(tmp_path / "page.png"), *question]) == 0
        answers.append(capsys.readouterr().out.splitlines()[-1])
        files = ["--json", str(output / "scores.json"), "--predictions", str(output / "answers.jsonl")]
        options = ["--split", "train", "--limit", "4", "--max-new-tokens", "5", *files]
        assert cli.main(["eval", "--checkpoint", checkpoint, "--data", data, *options]) == 0
        scores.append(((output / "answers.jsonl").read_text(), json.loads((output / "scores.json").read_text())))
        assert cli.main(["export", "--checkpoint", checkpoint, "--out", str(output / "exported")]) == 0
    assert answers[0] == answers[1]
    assert scores[0][0] == scores[1][0] and len(scores[0][0].splitlines()) == 4
    copy_folder(epath.Path(gcs_bucket) / "out" / "exported", tmp_path / "exported")
    exported = contents(tmp_path / "exported")
    assert "model.safetensors" in exported and exported == contents(tmp_path / "out" / "exported")


@pytest.mark.large
@pytest.mark.parametrize(
    ("fault", "advice"),
    [(fault_proxy.forbidden, "grant this account the right"), (fault_proxy.outage, "Run the same command again later")],
    ids=["forbidden", "outage"],
)
def test_a_store_that_is_lost_in_a_save_is_one_line_and_the_run_resumes(
    tmp_path, gcs_proxy, monkeypatch, fault, advice
):
    """From the first upload of step 2 until the command ends, the store refuses everything."""
    monkeypatch.setattr(test_preemption, "STEPS", 6)
    config = test_preemption.write_config(tmp_path)

    def lose_store(request):
        if request.kind == "upload" and "/checkpoints/2/" in request.name:
            gcs_proxy.fault = fault
            return fault(request)

    gcs_proxy.fault = lose_store
    start = time.monotonic()
    run = train(config, gcs_proxy.bucket, "--config.checkpoint.every_steps=1")
    seconds = time.monotonic() - start
    # Without an emulator, there are credentials.
    lines = [line for line in run.stderr.splitlines() if not re.match(r".*google[._]auth", line)]
    print(f"{seconds:.0f} s, failed {dict(gcs_proxy.failed)}", *lines, sep="\n")
    assert run.returncode == 75 and "Traceback" not in run.stderr
    assert lines[-1].startswith("alignvlm: error: ") and advice in lines[-1]
    assert all(line.startswith(("alignvlm: error: ", "warning: ")) for line in lines)
    assert seconds < 300

    gcs_proxy.fault = fault_proxy.no_fault
    run = train(config, gcs_proxy.bucket, "--config.checkpoint.every_steps=1")
    assert run.returncode == 0 and "trained 6 steps" in run.stdout
    assert "step 1 " not in run.stdout, "it starts over"
