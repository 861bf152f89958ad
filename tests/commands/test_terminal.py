"""Tests that output which cannot be written does not end a program."""

import io
import os
import subprocess
import sys

import pytest

from alignvlm_jax.commands.terminal import tolerant_output

PROGRAM = """
import sys
from tqdm import tqdm
from alignvlm_jax.commands.terminal import tolerant_output

with tolerant_output():
    sys.stdin.readline()
    with tqdm(total=2, file=sys.stderr) as bar:
        tqdm.write("a line")
        bar.update()
        sys.stdout.flush()
        print("to stderr", file=sys.stderr)
sys.exit(75)
"""


@pytest.mark.parametrize("output", ["pipe", "full disk"])
def test_a_program_whose_output_is_lost_keeps_its_exit_code(output):
    read, write = os.pipe()
    out = write if output == "pipe" else os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=out, stderr=out)
    for handle in {read, write, out}:
        os.close(handle)
    process.communicate(b"go\n", timeout=120)
    assert process.returncode == 75


def test_other_output_is_written(tmp_path):
    file = tmp_path / "output"
    with file.open("w") as out:
        process = subprocess.run([sys.executable, "-c", PROGRAM], input=b"go\n", stdout=out, stderr=out, timeout=120)
    assert process.returncode == 75
    assert "a line" in file.read_text() and "to stderr" in file.read_text() and "1/2" in file.read_text()


_CLOSED = """
import os, sys
from alignvlm_jax.commands.program import run_program
from alignvlm_jax.progress import progress_bar

def body():
    for _ in progress_bar(range(3)):
        print("to stdout")
        print("to stderr", file=sys.stderr)
    with open(sys.argv[1], "wb") as file:
        os.write(1, b"a library prints")
        file.write(b"data")
    return 3

sys.exit(run_program("tool", body))
"""


def test_closed_streams_do_not_end_a_program_or_get_into_its_files(tmp_path):
    """pixelb/crudini#82, posit-dev/py-shiny#1131: stdout and stderr are None if they were closed (`>&- 2>&-`)."""
    command = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    process = subprocess.run(["sh", "-c", command, sys.executable, _CLOSED, tmp_path / "file"], timeout=60)
    assert process.returncode == 3
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"l\\xe4ufe"), ("latin-1", b"l\xe4ufe"), ("utf-8", b"l\xc3\xa4ufe")]
)
def test_characters_that_the_output_lacks_are_escaped(encoding, shown, monkeypatch):
    """aws/sagemaker-containers#159: one character that the log cannot encode ended a training job."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_output():
        # The name of a file may also contain bytes that are no text.
        print("l\u00e4ufe/eins 12,50 \u20ac \udce4")
        # Complete lines reach a log file at once.
        text = stream.buffer.getvalue()
    assert text.startswith(shown) and b"12,50 " in text and text.endswith(b"\\udce4\n")
    assert (b"\\u20ac" in text) == (encoding != "utf-8")
