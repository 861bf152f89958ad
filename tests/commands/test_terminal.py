"""Output that cannot be written ends nothing."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from tqdm import tqdm
from alignvlm_jax.commands.terminal import lasting_output

with lasting_output():
    sys.stdin.readline()
    with tqdm(total=2, file=sys.stderr) as bar:
        tqdm.write("a line")
        bar.update()
        sys.stdout.flush()
        print("to stderr", file=sys.stderr)
sys.exit(75)
"""


@pytest.mark.parametrize("how", ["pipe", "full disk"])
def test_a_program_whose_output_is_lost_ends_as_it_would(how):
    read, write = os.pipe()
    out = write if how == "pipe" else os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=out, stderr=out)
    for handle in {read, write, out}:
        os.close(handle)
    process.communicate(b"go\n", timeout=120)
    assert process.returncode == 75


def test_what_can_be_written_is(tmp_path):
    file = tmp_path / "said"
    with file.open("w") as out:
        process = subprocess.run([sys.executable, "-c", PROGRAM], input=b"go\n", stdout=out, stderr=out, timeout=120)
    assert process.returncode == 75
    assert "a line" in file.read_text() and "to stderr" in file.read_text() and "1/2" in file.read_text()
