"""The lock on a local disk, with real processes."""

import errno
import shutil
import subprocess
import sys

import pytest

from alignvlm_jax import cli
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases import one_writer as module
from alignvlm_jax.leases.lease import InUseError, LeaseLostError
from alignvlm_jax.leases.lease_file import LeaseFile
from alignvlm_jax.leases.one_writer import one_writer, take

# Holds a lease until it is killed. It imports neither JAX nor anything else that takes long.
HOLDER = """
import sys, time
from alignvlm_jax.leases.one_writer import take
lease = take(sys.argv[1])
print(lease.ticket() or "held", flush=True)
time.sleep(60)
"""


def start_holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


@pytest.fixture(params=["local", "shared"])
def kind(request, monkeypatch):
    monkeypatch.setenv(module.KIND_VARIABLE, request.param)
    return request.param


def test_a_second_writer_is_refused_and_a_killed_one_frees_the_place(tmp_path, kind):
    """meta-pytorch/torchtune#481: the same command twice. A dead process of this machine is known at once."""
    folder = tmp_path / "run"
    with start_holder(folder) as process:
        with pytest.raises(
            InUseError, match=rf"another run is writing to it: host .*, pid {process.pid}, since 20"
        ) as info:
            take(folder)
        assert info.value.exit_code == 75
        process.kill()
        process.wait()
    with one_writer(folder) as lease:
        lease.check()
    assert not list(folder.iterdir()), "nothing is left behind"


def test_one_process_does_not_write_twice_to_one_place(tmp_path, kind):
    with one_writer(tmp_path / "out.jsonl", beside=True):
        (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
        with pytest.raises(InUseError):
            take(tmp_path / "link", beside=True)
        with one_writer(tmp_path / "other.jsonl", beside=True):
            pass
    (tmp_path / "link").unlink()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_folder_was_removed_completes_nothing_in_the_next_one(tmp_path, kind):
    lease = take(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with one_writer(tmp_path / "run") as next_lease:
        with pytest.raises(LeaseLostError, match="this run stops without completing anything more"):
            lease.check()
        lease.release()
        next_lease.check()


def test_the_command_ends_with_75(tmp_path, capsys, monkeypatch):
    def run(args):
        take(tmp_path)

    with one_writer(tmp_path):
        monkeypatch.setattr(cli, "parse", lambda argv: cli.argparse.Namespace(run=run, debug=False))
        assert cli.main([]) == 75
    assert "another run is writing to it: host" in capsys.readouterr().err


def test_a_file_system_without_locks_gets_a_lease_file(tmp_path, monkeypatch):
    def lock(place):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module, "LocalLock", lock)
    lease = take(tmp_path)
    assert isinstance(lease, LeaseFile)
    lease.release()


@pytest.mark.parametrize("name", ["file", "file/deeper/run"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/file: a file, expected a folder") as info:
        take(tmp_path / name)
    assert info.value.exit_code == 2


def test_a_kind_of_lease_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(module.KIND_VARIABLE, "nfs")
    with pytest.raises(UserError, match="ALIGNVLM_LEASE=nfs: expected local or shared"):
        take(tmp_path)
