"""`tools/export_pytorch.py` and `tools/import_pytorch.py`, run as scripts."""

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignvlm_jax.inference import verification
from alignvlm_jax.interop import export
from tests.interop.exported import assert_same_weights, make_checkpoint, read_weights

_TOOLS = Path(__file__).parents[2] / "tools"

_WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # Importing them fails.
checkpoint, folder, back, tools = sys.argv[1:]
sys.argv = ["export", "--checkpoint", checkpoint, "--out", folder, "--max-shard-size", "20KB"]
assert runpy.run_path(f"{tools}/export_pytorch.py")["main"]() == 0
sys.argv = ["import", "--folder", folder, "--out", back]
assert runpy.run_path(f"{tools}/import_pytorch.py")["main"]() == 0
"""


def test_a_round_trip_needs_no_torch(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    paths = [str(tmp_path / name) for name in ("checkpoint", "folder", "back")]
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, *paths, str(_TOOLS)], check=True, cwd=_TOOLS.parent)
    assert len(list((tmp_path / "folder").glob("model-*.safetensors"))) > 3
    assert_same_weights(read_weights(checkpoint), read_weights(tmp_path / "back"))


@pytest.mark.parametrize(
    ("tool", "arguments", "problem"),
    [
        ("export_pytorch", ["--checkpoint", "nowhere", "--out", "out"], "error: nowhere: no such folder"),
        ("import_pytorch", ["--folder", "nowhere", "--out", "out"], "error: nowhere is not an AlignVLM folder"),
        (
            "import_pytorch",
            ["--folder", "nowhere", "--out", "out", "--mesh", "rows=2"],
            "error: --mesh rows=2: expected",
        ),
        ("export_pytorch", ["--checkpoint", "x", "--out", "out", "--max-shard-size", "big"], "expected a size such as"),
        ("export_pytorch", ["--checkpoint", "x", "--out", "out", "--verify-image", "no.png"], "error: no.png"),
        ("export_pytorch", ["--checkpoint", "x", "--out", "out", "--verify", "--vision-only"], "the complete model"),
    ],
)
def test_problems_are_reported_in_one_line(tool, arguments, problem, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(_TOOLS / f"{tool}.py"), run_name="__main__")
    assert exited.value.code == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("answer", "code"), [("12.50", 0), ("12.5", 3)])
def test_the_exit_code_tells_whether_the_folder_was_verified(answer, code, monkeypatch, capsys, tmp_path):
    """tests/inference/test_verification.py compares real folders."""
    result = verification.Result(np.arange(3), np.arange(1), "12.50", np.ones((2, 4), np.float32))
    comparison = verification.Comparison("a?", result, dataclasses.replace(result, answer=answer))
    monkeypatch.setattr(verification, "verify_export", lambda *args, **kwargs: comparison)
    monkeypatch.setattr(export, "export_alignvlm", lambda checkpoint, out, **kwargs: out.mkdir())
    arguments = ["--checkpoint", "checkpoint", "--out", str(tmp_path / "out"), "--verify"]
    monkeypatch.setattr(sys, "argv", ["export_pytorch", *arguments])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(_TOOLS / "export_pytorch.py"), run_name="__main__")
    assert exited.value.code == code
    assert ("verified: the same" if code == 0 else "the answers differ") in capsys.readouterr().out
    assert (tmp_path / "out").is_dir()
