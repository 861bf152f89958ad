"""Checkpoints on failing disks: damaged files are named, damaged steps are skipped, the last good step is kept."""

import contextlib
import json
import os
import pathlib
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.checkpoints import integrity, provenance
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress, complete_steps, find_undamaged, read_meta
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.errors import UserError
from tests.training import breakage


def state_at(step: int, size: int = 64) -> tuple[dict, dict]:
    """Returns weights and an optimizer state whose values show the step they belong to."""
    weights = jnp.full((size,), step, jnp.float32)
    return {"language": {"embedding": weights}}, {"mu": {"embedding": weights + 1}}


def write_steps(workdir, *steps, size=64, metrics=None, **config) -> Checkpointer:
    """Saves the steps in order; `metrics` is {step: metrics}, and `config` holds fields of `CheckpointConfig`."""
    with Checkpointer(workdir, ExperimentConfig(checkpoint=CheckpointConfig(**{"keep": 10, **config}))) as checkpointer:
        for step in steps:
            checkpointer.save(Progress(step, 0, step), *state_at(step, size), {"rows": step}, (metrics or {}).get(step))
    return checkpointer


def restored_step(workdir) -> int | None:
    """Returns the step that a run would resume from, or None, after restoring it and checking its arrays."""
    with Checkpointer(workdir, ExperimentConfig()) as checkpointer:
        progress = checkpointer.latest()
        if progress is None:
            return None
        params, opt_state = checkpointer.restore(progress, *state_at(0))
        assert params["language"]["embedding"][5] == opt_state["mu"]["embedding"][5] - 1 == progress.step
        assert checkpointer.data_state(progress) == {"rows": progress.step}
        return progress.step


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("written")
    write_steps(workdir, 10, 20)
    return workdir


@pytest.fixture
def run(written, tmp_path):
    """A copy of a run with steps 10 and 20, for the test to damage."""
    return pathlib.Path(shutil.copytree(written, tmp_path / "run"))


def list_files(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_the_newest_step_is_resumed_from_and_records_what_wrote_it(run):
    assert restored_step(run) == 20
    meta = read_meta(run / "checkpoints" / "20")
    assert meta["versions"] == provenance.versions() and {"jax", "alignvlm_jax"} <= set(meta["versions"])
    git = provenance.git_revision()
    assert git is None or len(git.split("+")[0]) == 12


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_any_damaged_file_is_named(run, capsys, how):
    step = run / "checkpoints" / "20"
    files = list_files(step)
    assert len(files) > 15
    for path in files:
        before = path.read_bytes()
        if how == "deleted":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(before[:-1])
        else:
            path.write_bytes(flip(before))
        if before or how == "deleted":  # An empty file can only be deleted.
            reason = integrity.damage(step)
            assert reason and (str(path.relative_to(step)) in reason or path.name.startswith("digests")), path
        path.write_bytes(before)
    assert integrity.damage(step) is None


def flip(data: bytes) -> bytes:
    """Returns the data with one bit flipped, in the middle byte."""
    middle = len(data) // 2
    return data[:middle] + bytes([byte ^ 1 for byte in data[middle : middle + 1]]) + data[middle + 1 :]


def test_a_flipped_byte_of_a_weight_is_detected(run, capsys):
    """Without digests nothing would notice it: Orbax restores the changed number without an error."""
    step = run / "checkpoints" / "20"
    path = max((step / "params").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    path.write_bytes(flip(path.read_bytes()))
    assert restored_step(run) == 10
    assert f"{step} is skipped: {path.relative_to(step)} does not match its digest" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["empty", "half deleted", "not finished", "digests torn"])
def test_an_incomplete_step_is_skipped(run, capsys, how):
    step = run / "checkpoints" / "20"
    if how == "empty":
        shutil.rmtree(step)
        step.mkdir()
    elif how == "half deleted":
        shutil.rmtree(step / "opt_state")
    elif how == "not finished":
        (step / "digests.0-of-1.json").rename(step / "digests.0-of-2.json")
    else:
        (step / "digests.0-of-1.json").write_bytes((step / "digests.0-of-1.json").read_bytes()[:-20])
    assert restored_step(run) == 10 and complete_steps(run / "checkpoints") == [10]
    assert f"{step} is skipped" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "10")
    if how == "half deleted":  # The step was complete once, so starting over would lose it.
        with pytest.raises(UserError, match="no undamaged checkpoint"):
            restored_step(run)
    else:  # A kill during the first save leaves this; the run starts over.
        assert restored_step(run) is None


def test_a_run_does_not_start_over_if_all_checkpoints_are_damaged(run):
    for step in (10, 20):
        path = run / "checkpoints" / str(step) / "meta" / "metadata"
        path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(UserError, match=r"to resume from \(step 20: meta/metadata .*; step 10: "):
        restored_step(run)
    for step in (10, 20):  # The same holds for checkpoints of versions that wrote no digests.
        (run / "checkpoints" / str(step) / "digests.0-of-1.json").unlink()
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        restored_step(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]


def test_a_skipped_step_does_not_count_as_kept(run):
    """Step 20 is damaged when step 30 is saved. With `keep=2`, step 10 must stay, as the step to fall back to."""
    path = next(iter((run / "checkpoints" / "20" / "params" / "d").iterdir()))
    path.write_bytes(flip(path.read_bytes()))
    config = ExperimentConfig(checkpoint=CheckpointConfig(keep=2))
    with Checkpointer(run, config) as checkpointer:
        assert checkpointer.latest().step == 10
        checkpointer.save(Progress(30, 0, 30), *state_at(30), {"rows": 30})
    assert complete_steps(run / "checkpoints") == [10, 30]
    assert not (run / "checkpoints" / "20").exists()


def test_a_problem_with_an_old_step_does_not_affect_the_new_one(run, capsys):
    path = run / "checkpoints" / "10" / "meta" / "metadata"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])  # no longer valid UTF-8
    write_steps(run, 30, keep=3)
    assert restored_step(run) == 30
    with breakage.immutable(run / "checkpoints" / "20"):
        write_steps(run, 40, keep=1)
    assert restored_step(run) == 40
    assert "older checkpoints could not be deleted" in capsys.readouterr().err


def test_digests_of_other_hosts_are_waited_for(run):
    step = run / "checkpoints" / "20"
    complete = (step / "digests.0-of-1.json").read_text()
    (step / "digests.0-of-1.json").write_text(complete[:100])  # What another host sees if it reads too early.
    writer = threading.Timer(0.3, (step / "digests.0-of-1.json").write_text, [complete])
    writer.start()
    integrity.wait_for_seals(step, seconds=60)
    writer.join()
    (step / "digests.0-of-1.json").write_text(complete[:100])
    with pytest.raises(OSError, match="has not written its digests"):
        integrity.wait_for_seals(step, seconds=0.1)


def test_a_step_is_sealed_only_once_its_files_are_on_the_disk(tmp_path, monkeypatch):
    """Older steps are deleted once a step is sealed, so the sealed step must survive a power failure at that moment."""
    synced, num_synced_before_digests = [], []
    fsync, write_text = os.fsync, pathlib.Path.write_text

    def recording_fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def recording_write_text(path, *arguments, **named):
        if path.name.startswith("digests"):
            num_synced_before_digests.append(len(synced))
        return write_text(path, *arguments, **named)

    write_steps(tmp_path, 10)
    step = tmp_path / "checkpoints" / "10"
    (step / "digests.0-of-1.json").unlink()
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(pathlib.Path, "write_text", recording_write_text)
    integrity.seal(step)
    # First all files and folders are synced, then the digests are written and synced.
    before = set(synced[: num_synced_before_digests[0]])
    files = [path for path in list_files(step) if not path.name.startswith("digests")]
    folders = {str(path) for path in (step, *step.rglob("*")) if path.is_dir()} | {str(step.parent)}
    assert {str(path) for path in files} | folders <= before
    assert synced[num_synced_before_digests[0] :] == [str(step / "digests.0-of-1.json"), str(step)]


def test_a_step_is_complete_with_its_last_file_and_not_before(run):
    """Files appear one by one and nothing is renamed, as in an object store."""
    source, copy = run / "checkpoints" / "20", run / "checkpoints" / "30"
    for order in (list_files(source), list_files(source)[::-1]):
        for path in order:
            assert integrity.incompleteness(copy), f"complete without {path}"
            (copy / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy / path.relative_to(source))
        assert integrity.damage(copy) is None
        shutil.rmtree(copy)


def test_each_process_seals_the_files_it_wrote(run):
    step = run / "checkpoints" / "20"
    (step / "digests.0-of-1.json").unlink()
    # The step of one process becomes one that two processes wrote.
    (step / "params" / "ocdbt.process_0").rename(step / "params" / "ocdbt.process_1")
    integrity.seal(step, 0, 2)
    assert "process 1" in integrity.incompleteness(step)
    integrity.seal(step, 1, 2)
    sealed = [set(json.loads((step / f"digests.{i}-of-2.json").read_text())["files"]) for i in (0, 1)]
    assert not sealed[0] & sealed[1] and all("ocdbt.process_1" in file or "process_1" in file for file in sealed[1])
    assert integrity.damage(step) is None
    for path in sealed[1]:
        (step / path).write_bytes(flip((step / path).read_bytes()))
        reasons = [integrity.damage(step, share=(i, 2)) for i in (0, 1)]
        assert reasons.count(None) == 1, "exactly one of the two processes checks the file"
        (step / path).write_bytes(flip((step / path).read_bytes()))


def test_a_run_that_fell_back_overwrites_the_steps_it_skipped(run):
    step = run / "checkpoints" / "20"
    (step / "meta" / "metadata").write_bytes(b"")
    write_steps(run, 15, keep=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["15"], "20 is later than the step to resume from"
    write_steps(run, 20, keep=2)
    assert restored_step(run) == 20


def test_weights_are_not_read_from_a_damaged_step(run, capsys):
    (run / "config.json").write_text("{}")
    step = run / "checkpoints" / "20"
    path = next(iter((step / "params" / "d").iterdir()))
    path.write_bytes(flip(path.read_bytes()))
    assert find_undamaged(run) == (run, 10)
    assert f"{path.relative_to(step)} does not match its digest" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"no undamaged checkpoint: .*{path.name}"):
        find_undamaged(step)


def test_retention_rules_choose_the_steps_to_keep(tmp_path):
    losses = {step: {"loss": loss} for step, loss in zip(range(1, 9), (9, 3, 8, 7, 6, float("nan"), 5, 4), strict=True)}
    write_steps(tmp_path, *range(1, 9), metrics=losses, keep=2, keep_every=4, keep_best=1)
    # The best loss is that of step 2; 4 and 8 are multiples of `keep_every`; 7 and 8 are the newest two.
    assert complete_steps(tmp_path / "checkpoints") == [2, 4, 7, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "7", "8"]


@contextlib.contextmanager
def full_disk(workdir):
    filler = breakage.fill(workdir)
    yield
    filler.unlink()


@contextlib.contextmanager
def file_in_the_way(workdir):
    """Puts a file where the folder of checkpoints must be."""
    (workdir / "checkpoints").rename(workdir / "away")
    (workdir / "checkpoints").write_text("")
    yield
    (workdir / "checkpoints").unlink()
    (workdir / "away").rename(workdir / "checkpoints")


# How the disk fails -> (context manager that breaks the disk, expected message).
FAILURES = {
    "full disk": (full_disk, "No space left on device"),
    "read-only": (breakage.read_only, "Read-only file system"),
    "no permission": (lambda workdir: breakage.immutable(workdir / "checkpoints"), "Operation not permitted"),
    "a file in the way": (file_in_the_way, "Not a directory|File exists"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_disk_costs_no_step(tmp_path, capsys, how):
    break_disk, message = FAILURES[how]
    # A file system of its own, which can be filled and made read-only without harm to others.
    parent = tmp_path if how == "no permission" else breakage.small_disk(tmp_path / "disk", 4)
    with contextlib.nullcontext(parent) if how == "no permission" else parent as workdir:
        with Checkpointer(workdir, ExperimentConfig(checkpoint=CheckpointConfig(keep=1))) as checkpointer:
            save = lambda step: checkpointer.save(Progress(step, 0, step), *state_at(step, 100_000), {"rows": step})  # noqa: E731
            save(1)
            checkpointer.wait()
            with break_disk(workdir):
                save(2)
                with pytest.raises(UserError, match=f"step 2 could not be saved in {workdir}/checkpoints/2: {message}"):
                    checkpointer.wait()
            assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
            save(3)  # The disk works again, and so does the checkpointer.
        assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
        params, _ = checkpointer.restore(Progress(3, 0, 3), *state_at(0, 100_000))
        np.testing.assert_array_equal(params["language"]["embedding"], 3)
        assert "warning: step 2 could not be saved" in capsys.readouterr().err
