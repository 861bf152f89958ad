"""`tools/export_pytorch.py` and `tools/import_pytorch.py`, run as scripts."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.exported import assert_same_weights, make_checkpoint, read_weights

_TOOLS = Path(__file__).parents[2] / "tools"

_WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # Importing them fails.
checkpoint, folder, back, tools = sys.argv[1:]
sys.argv = ["export", "--checkpoint", checkpoint, "--out", folder, "--max-shard-size", "20KB"]
runpy.run_path(f"{tools}/export_pytorch.py", run_name="__main__")
sys.argv = ["import", "--folder", folder, "--out", back]
runpy.run_path(f"{tools}/import_pytorch.py", run_name="__main__")
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
