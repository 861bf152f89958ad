"""The command restarts with huge pages where they help, once, and never in place of another program."""

import os
import subprocess
import sys

import pytest

from alignvlm_jax.commands.huge_pages import same_command, with_huge_pages

MODES = "always [madvise] never"
PAGES = "glibc.malloc.hugetlb=1"


def test_the_restarted_program_keeps_its_environment_and_does_not_restart_again():
    environment = with_huge_pages({"HOME": "/h", "GLIBC_TUNABLES": "glibc.malloc.check=1"}, MODES)
    assert environment["HOME"] == "/h" and environment["GLIBC_TUNABLES"] == f"glibc.malloc.check=1:{PAGES}"
    assert with_huge_pages({}, MODES)["GLIBC_TUNABLES"] == PAGES
    assert with_huge_pages(environment, MODES) is None
    del environment["GLIBC_TUNABLES"]  # as the C library does in a program with special rights
    assert with_huge_pages(environment, MODES) is None


@pytest.mark.parametrize(
    "environ, modes",
    [
        ({}, "[always] madvise never"),
        ({}, "always madvise [never]"),
        ({}, ""),  # not Linux, or a kernel without huge pages
        ({"ALIGNVLM_HUGE_PAGES": "0"}, MODES),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, MODES),
        ({"JAX_PLATFORMS": "cuda"}, MODES),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, MODES),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, MODES),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, MODES),
    ],
)
def test_no_restart_where_it_would_not_help_or_a_launcher_waits(environ, modes):
    assert with_huge_pages(environ, modes) is None


def test_only_the_command_itself_is_restarted():
    script = ["python", "-X", "utf8", "/bin/alignvlm", "train"]
    assert same_command(script, "/bin/alignvlm") == [sys.executable, *script[1:]]
    module = ["python", "-m", "alignvlm_jax", "demo"]
    assert same_command(module, "/p/alignvlm_jax/__main__.py") == [sys.executable, *module[1:]]
    # A notebook, a script that calls `main`, an interpreter without a script.
    assert same_command(["python", "-m", "ipykernel_launcher"], "/p/ipykernel_launcher.py") is None
    assert same_command(["python", "mine.py"], "mine.py") is None
    assert same_command(["python"], None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are a feature of Linux")
def test_exec_keeps_the_process_and_its_exit_code(tmp_path):
    """The same process reports its id, its environment and a usage error's exit code after the restart."""
    program = tmp_path / "alignvlm"
    program.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from alignvlm_jax.commands import huge_pages\n"
        f"huge_pages._MODES = Path({str(tmp_path / 'modes')!r})\n"
        "print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "huge_pages.restart_with_huge_pages()\n"
        "sys.exit(7)\n"
    )
    (tmp_path / "modes").write_text(MODES)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program, "a b", "--c=d"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        before, after = process.communicate()[0].splitlines()
    assert before == f"{process.pid} ['a b', '--c=d'] None"
    assert after == f"{process.pid} ['a b', '--c=d'] {PAGES}"
    assert process.returncode == 7
