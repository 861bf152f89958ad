"""`alignvlm export`, and `alignvlm import` of what it wrote."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from alignvlm_jax import cli
from alignvlm_jax.inference import verification
from alignvlm_jax.interop import export
from tests.interop.exported import assert_same_weights, make_checkpoint, read_weights

_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # Importing them fails.
from alignvlm_jax import cli
checkpoint, folder, back = sys.argv[1:]
assert cli.main(["export", "--checkpoint", checkpoint, "--out", folder, "--max-shard-size", "20KB"]) == 0
assert cli.main(["import", "--folder", folder, "--out", back]) == 0
"""


def test_a_round_trip_needs_no_torch(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    paths = [str(tmp_path / name) for name in ("checkpoint", "folder", "back")]
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, *paths], check=True)
    assert len(list((tmp_path / "folder").glob("model-*.safetensors"))) > 3
    assert_same_weights(read_weights(checkpoint), read_weights(tmp_path / "back"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--checkpoint", "nowhere"], "error: nowhere: no such folder"),
        (["--checkpoint", "x", "--verify-image", "no.png"], "error: no.png"),
        (["--checkpoint", "x", "--verify", "--vision-only"], "the complete model"),
    ],
)
def test_problems_are_reported_in_one_line(arguments, problem, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *arguments, "--out", "out"]) == 2
    errors = capsys.readouterr().err
    assert problem in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_size_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "--checkpoint", "x", "--out", "out", "--max-shard-size", "big"])
    assert "expected a size such as" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "code"), [("12.50", 0), ("12.5", 3)])
def test_the_exit_code_tells_whether_the_folder_was_verified(answer, code, monkeypatch, capsys, tmp_path):
    """tests/inference/test_verification.py compares real folders."""
    result = verification.Result(np.arange(3), np.arange(1), "12.50", np.ones((2, 4), np.float32))
    comparison = verification.Comparison("a?", result, dataclasses.replace(result, answer=answer))
    monkeypatch.setattr(verification, "verify_export", lambda *args, **kwargs: comparison)
    monkeypatch.setattr(export, "export_alignvlm", lambda checkpoint, out, **kwargs: pathlib.Path(out).mkdir())
    arguments = ["--checkpoint", "checkpoint", "--out", str(tmp_path / "out"), "--verify"]
    assert cli.main(["export", *arguments]) == code
    assert ("verified: the same" if code == 0 else "the answers differ") in capsys.readouterr().out
    assert (tmp_path / "out").is_dir()
