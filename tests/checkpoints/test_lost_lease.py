"""Two writers of one workdir: the one that has lost its lease completes no step and deletes nothing."""

import contextlib

import pytest

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.new_folder import new_folder
from alignvlm_jax.checkpoints.workdir import CHECKPOINTS_FOLDER, Progress, complete_steps
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.leases.holder import Holder, Job
from alignvlm_jax.leases.lease import InUseError, LeaseLostError, Place
from alignvlm_jax.leases.lease_file import LeaseFile
from alignvlm_jax.leases.one_writer import one_writer
from tests.checkpoints.test_integrity import state_at


def lease_of(workdir, host):
    """Takes the lease, as each start of one job does on another machine."""
    return LeaseFile(Place.inside(workdir), Holder(host, 7, "", host, "1", Job("Slurm 42")), renews_itself=False)


def save(checkpointer, step):
    checkpointer.save(Progress(step, 0, step), *state_at(step), {"rows": step})


def test_a_writer_that_lost_its_lease_deletes_and_seals_nothing(tmp_path):
    """Physical-Intelligence/openpi#566: two runs that delete each other's `*.orbax-checkpoint-tmp*`."""
    checkpoints = tmp_path / CHECKPOINTS_FOLDER
    lease = lease_of(tmp_path, "a")
    with contextlib.suppress(LeaseLostError), Checkpointer(tmp_path, ExperimentConfig(), lease) as old:
        save(old, 10)
        old.wait()
        with Checkpointer(tmp_path, ExperimentConfig(), lease_of(tmp_path, "b")) as new:
            save(new, 20)
            new.wait()
            being_written = checkpoints / "30.orbax-checkpoint-tmp"
            being_written.mkdir()
            # The old writer's next steps: one that the new writer has as well, and a later one.
            for step in (20, 21):
                with pytest.raises(LeaseLostError, match="another run took over its lease: host b"):
                    save(old, step)
            assert complete_steps(checkpoints) == [10, 20] and being_written.exists()
            assert not (checkpoints / "21").exists()
            new._lease.check()


def test_a_lease_that_is_lost_during_a_save_prevents_its_seal(tmp_path, monkeypatch):
    lease, takers = lease_of(tmp_path, "a"), []
    checkpointer = Checkpointer(tmp_path, ExperimentConfig(), lease)
    wait = checkpointer._store.wait
    monkeypatch.setattr(checkpointer._store, "wait", lambda: (wait(), takers.append(lease_of(tmp_path, "b"))))
    with pytest.raises(LeaseLostError), contextlib.closing(checkpointer._store):
        save(checkpointer, 10)
        checkpointer.wait()
    step = tmp_path / CHECKPOINTS_FOLDER / "10"
    assert (step / "params").is_dir(), "all files of the step are there"
    assert not list(step.glob("digests.*")) and complete_steps(step.parent) == []


def test_two_exports_to_one_folder_do_not_both_do_the_work(tmp_path):
    with one_writer(tmp_path / "out", beside=True):
        with pytest.raises(InUseError, match="out: another run is writing to it"), new_folder(tmp_path / "out"):
            pytest.fail("the block must not run")
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
