"""What happens to a run: killed, preempted, on a disk that fills up; and what it says before it begins."""

import dataclasses
import os
import pathlib
import re
import signal
import time

import jax
import pytest

from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training import budget, checkpoint
from alignvlm_jax.training.retention import CheckpointConfig
from tests.parallel import tiny
from tests.training import breakage

MESH = (8, 1, 1)


def config(**changes):
    return dataclasses.replace(tiny.config(MESH), checkpoint=CheckpointConfig(**{"every_steps": 1, **changes}))


def run(workdir, experiment, **seams):
    losses = {}
    return tiny.train(workdir, experiment, losses=losses, made=[], **seams), losses


def test_a_disk_that_fills_up_does_not_end_a_run(tmp_path, capsys):
    seen = {}
    with breakage.small_disk(tmp_path / "disk", 8) as disk:

        def on_step(step):
            steps = lambda: checkpoint.complete_steps(disk / "run" / "checkpoints")  # noqa: E731
            if step == 2:  # before step 2 is saved
                while not steps():
                    time.sleep(0.01)
                seen["filler"] = breakage.fill(disk)
            if step == 4:  # the save of step 3 has waited for that of step 2 to fail
                seen["left"] = steps()
                seen["filler"].unlink()

        result, _ = run(disk / "run", config(), on_step=on_step)
        assert result.progress.step == 5 and seen["left"] == [1]
        assert checkpoint.find_undamaged(disk / "run")[1] == 5
    said = capsys.readouterr().err
    assert re.search(r"warning: step 2 could not be saved in .*: No space left on device; the newest", said), said


def test_sigterm_saves_the_step_and_says_so_by_its_own_exit_code(tmp_path):
    began = {}

    def on_step(step):
        if step == 2:
            began["at"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(distributed.Preempted) as error:
        run(tmp_path, config(every_steps=100), on_step=on_step)
    assert error.value.exit_code == 75 and checkpoint.find_undamaged(tmp_path)[1] == 2
    assert time.monotonic() - began["at"] < 60


def test_the_budget_is_said_before_the_first_step(tmp_path, capsys):
    experiment = config(keep=2, keep_best=1)
    text = budget.describe(experiment, experiment.stages, make_mesh(experiment.mesh), tmp_path / "not" / "there")
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.make_params(experiment)))
    size = f"{3 * params / 2**20:.1f}"  # weights and Adam's two moments, and a few counters
    assert f"checkpoints: at most {size} MiB each, 4 at a time" in text and "GiB free" in text
    with breakage.small_disk(tmp_path / "disk", 1) as disk:
        assert "warning" in budget.describe(
            config(keep=1000), experiment.stages, make_mesh(experiment.mesh), disk / "run"
        )


def test_nothing_is_unpickled_and_no_archive_is_unpacked_blindly():
    """No code of the package may call what executes what it reads, or extracts to wherever an archive says."""
    root = pathlib.Path(checkpoint.__file__).parents[1]
    bad = re.compile(
        r"(import|from) (pickle|dill|joblib|cloudpickle|shelve|marshal)|\bpickle\.loads?\(|allow_pickle\s*=\s*True"
        r"|torch\.load\((?!.*weights_only=True)|yaml\.(unsafe_)?load\(|extractall\(|unpack_archive\("
        r"|trust_remote_code\s*=\s*True"
    )
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bad.search(line) and path.name != "model_card.py"  # what a card tells its reader to do
    ]
    assert not found, found
