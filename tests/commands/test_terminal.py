"""Tests that output which cannot be written does not end a program."""

import os
import subprocess
import sys

import pytest

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
