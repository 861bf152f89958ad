"""`alignvlm import`: which options belong together. tests/interop imports real folders."""

import pytest

from alignvlm_jax import cli
from alignvlm_jax.interop import import_pytorch

FOLDER = ["--folder", "nowhere"]
BACKBONES = ["--vision", "nano", "--language", "nano"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "expected --vision and --language, or --folder"),
        (["--vision", "nano"], "expected --vision and --language, or --folder"),
        ([*FOLDER, "--language", "nano"], "--language cannot be used with --folder"),
        ([*FOLDER, "--image-token", "<i>"], "--image-token cannot be used with --folder"),
        ([*FOLDER, "--max-tiles", "3"], "--max-tiles cannot be used with --folder"),
        ([*BACKBONES, "--dtype", "float16"], "--dtype float16 is for --folder"),
        (FOLDER, "nowhere is not an AlignVLM folder"),
        ([*FOLDER, "--mesh", "rows=2"], "--mesh rows=2: expected"),
    ],
)
def test_problems_are_reported_in_one_line(arguments, problem, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", *arguments, "--out", "out"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("alignvlm: error: ") and problem in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_model_in_the_package_has_a_name(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(import_pytorch, "import_alignvlm", lambda folder, out, **options: folders.append(folder))
    assert cli.main(["import", "--folder", "nano", "--out", str(tmp_path / "out")]) == 0
    assert (folders[0] / "model.safetensors").is_file()
