"""The command line: help with examples, one-line errors, and `--debug`."""

import json
import os
import subprocess
import sys

import PIL.Image
import pytest

import alignvlm_jax
from alignvlm_jax import cli
from alignvlm_jax.inference.prompts import check_question

GROUPS = {
    "use a model": ("ask", "inspect"),
    "train a model": ("demo", "prepare", "train", "compile"),
    "measure a model": ("eval", "analyze", "reproduce"),
    "convert a model": ("import", "export"),
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)


def error_line(capsys, *argv: str) -> str:
    """Runs a command that must fail with a `UserError`; returns the single line that it prints."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("alignvlm: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture
def page(tmp_path):
    PIL.Image.new("RGB", (80, 120), "white").save(tmp_path / "page.png")
    return str(tmp_path / "page.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"  alignvlm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("analysis", ["noise", "vocabulary", "geometry", "names"])
def test_help_of_each_analysis_has_examples(analysis, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["analyze", analysis, "--help"])
    assert f"  alignvlm analyze {analysis}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS), "one line per command"
    # Each heading is followed by the commands of its group.
    lines = out[out.index("\ncommands:\n") :].splitlines()[2 : 2 + len(GROUPS) + len(COMMANDS)]
    expected = [word for group, commands in GROUPS.items() for word in (f"{group}:", *commands)]
    assert [line.strip() if line.endswith(":") else line.split()[0] for line in lines] == expected


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert alignvlm_jax.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["train", "--config", "configs/nano.py"],
        ["train", "--config", "configs/nano.py", "--workdir", "x", "--confg.seed=1"],
        ["ask", "--checkpoint", "x", "page.png", "--question", "q", "--config.seed=1"],
        ["eval", "--checkpoint", "x", "--control", "upside-down"],
        ["eval", "--checkpoint", "x", "--limit", "0"],
        ["analyze"],
        ["analyze", "noise", "--checkpoint", "x", "--data", "d", "--out", "o", "--sigmas", "1,two"],
    ],
)
def test_wrong_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "error: " in capsys.readouterr().err


def test_config_overrides_are_collected():
    argv = ["train", "--config", "c.py", "--config.seed=1", "--workdir", "w", "--config.mesh.data", "2"]
    args = cli.parse(argv)
    assert args.overrides == ["seed=1", "mesh.data=2"]
    assert (args.config, args.workdir) == ("c.py", "w")


@pytest.mark.parametrize("argv", [["--debug", "demo"], ["demo", "--debug"], ["demo"]])
def test_debug_is_accepted_before_and_after_the_command(argv):
    assert cli.parse(argv).debug is ("--debug" in argv)


def test_debug_shows_the_traceback(capsys, tmp_path):
    argv = ["ask", "--checkpoint", "x", str(tmp_path / "none.png"), "--question", "What?"]
    assert "Traceback" not in error_line(capsys, *argv)
    assert cli.main([*argv, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("alignvlm: error: ")


def test_a_missing_config_is_reported(capsys, tmp_path):
    line = error_line(capsys, "train", "--config", "configs/nona.py", "--workdir", str(tmp_path / "w"))
    assert "configs/nona.py" in line and "nano.py" in line


def test_a_missing_image_is_reported(capsys, tmp_path):
    line = error_line(capsys, "ask", "--checkpoint", "x", str(tmp_path / "none.png"), "--question", "What?")
    assert "none.png" in line


def test_an_unreadable_image_is_reported(capsys, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    line = error_line(capsys, "ask", "--checkpoint", "x", str(tmp_path / "torn.png"), "--question", "What?")
    assert "torn.png" in line


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(capsys, page, question):
    assert "question is empty" in error_line(capsys, "ask", "--checkpoint", "x", page, "--question", question)


def test_the_inspected_image_is_not_overwritten(capsys, page):
    """siiptuo/pio#9: an output that is the input."""
    line = error_line(capsys, "inspect", "--checkpoint", "x", page, "--out", page)
    assert "IMAGE and --out are the same file" in line


def test_a_question_that_is_no_text_is_refused(capsys, page):
    """huggingface/transformers#43459, openai/tiktoken#82: half a surrogate pair, as extracted from a PDF."""
    assert "is not valid UTF-8" in error_line(capsys, "ask", "--checkpoint", "x", page, "--question", "a \ud83d b?")
    # The bytes of an argument where Python's locale is ASCII (PEP 383).
    question = "Größe?".encode().decode("ascii", "surrogateescape")
    assert check_question(question) == "Größe?"


@pytest.mark.parametrize("command", ["ask", "eval"])
@pytest.mark.parametrize("kind", ["missing", "a file", "empty", "broken"])
def test_a_folder_that_is_not_a_checkpoint_is_reported(capsys, page, tmp_path, command, kind):
    folder = tmp_path / "run"
    if kind == "a file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "broken":
        (folder / "config.json").write_text(json.dumps({"model": 3}))
    rest = [page, "--question", "What?"] if command == "ask" else []
    assert str(folder) in error_line(capsys, command, "--checkpoint", str(folder), *rest)


@pytest.mark.parametrize("text", ["def get_config(:\n", "x = 1\n", "import no_such_module\n"])
def test_an_invalid_config_file_is_reported(capsys, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    line = error_line(capsys, "train", "--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "w"))
    assert "mine.py" in line
    assert not (tmp_path / "w").exists()


def test_an_unknown_config_key_is_reported_with_the_closest_one(capsys, tmp_path):
    argv = ["train", "--config", "configs/nano.py", "--workdir", str(tmp_path / "w"), "--config.sed=1"]
    line = error_line(capsys, *argv)
    assert "sed" in line and "seed" in line
    assert not (tmp_path / "w").exists()


def test_no_warnings_about_tpus_on_a_machine_without_them():
    """libtpu is installed with the test dependencies; without a TPU it must not print warnings at every command."""
    code = "from alignvlm_jax import cli; cli._quiet_logs(debug=False); import jax; print(jax.devices()[0])"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout and process.stderr == ""
