"""A run that is killed (kill -9) at random moments, also during saves, and restarted until it finishes."""

import dataclasses
import itertools
import json
import pathlib
import random
import statistics
import time

import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import complete_steps
from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training.train_step import abstract_state
from tests.parallel import processes, tiny

MESH = (2, 1, 1)


def experiment(steps: int):
    """Returns a run that trains half of its steps with AdamW and half with Muon, and saves after every step."""
    config = tiny.config(MESH)
    (stage,) = config.stages
    stages = tuple(
        dataclasses.replace(stage, name=name, steps=steps // 2, optimizer=OptimizerConfig(name=name))
        for name in ("adamw", "muon")
    )
    return dataclasses.replace(config, stages=stages, checkpoint=CheckpointConfig(every_steps=1, keep=2))


class Journal(dict):
    """Dictionary for the losses of `tiny.train` that writes each of them to a file at once, so that a kill loses none.

    A line is {"step": 3, "loss": [hexadecimal, refused], "time": seconds}. Hexadecimal floats are exact.
    """

    def __init__(self, path: pathlib.Path):
        self._file = path.open("ab", buffering=0)

    def __setitem__(self, step, value):
        loss, refused = value
        line = {"step": step, "loss": [float(loss).hex(), refused], "time": time.monotonic()}
        self._file.write(json.dumps(line).encode() + b"\n")


def read_journal(journal: pathlib.Path) -> list[dict]:
    """Returns the entries of a journal, in the order in which the steps were done."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []


def start(folder: pathlib.Path, number: int, steps: int) -> processes.Process:
    """Starts or resumes the run in `folder`; `number` names the folder of this session's output."""
    arguments = dict(workdir=str(folder / "run"), journal=str(folder / "journal"), steps=steps)
    return processes.start(folder / str(number), "train_with_journal", 1, devices=2, **arguments)[0]


def is_saving(checkpoints: pathlib.Path) -> bool:
    """Returns whether some step is incomplete: it is being saved, or was when the process was killed."""
    complete = {str(step) for step in complete_steps(checkpoints)}
    return any(path.name not in complete for path in checkpoints.glob("*"))


def kill(process, journal: pathlib.Path, checkpoints: pathlib.Path, step: int, wait: float, save: bool) -> None:
    """Kills the process `wait` seconds after a step or, with `save`, in the middle of the next save after that."""

    def wait_until(condition):
        while not condition() and process.process.poll() is None:
            time.sleep(0.001)

    wait_until(lambda: any(entry["step"] >= step for entry in read_journal(journal)))
    time.sleep(wait)
    if save:
        wait_until(lambda: is_saving(checkpoints))
    process.process.kill()
    process.process.wait()


def killed_run(folder: pathlib.Path, steps: int, kills: int, pace: float) -> list[dict]:
    """Starts and kills the run repeatedly, then lets it finish; returns where each kill left it."""
    rng, outcomes = random.Random(0), []
    journal, checkpoints = folder / "journal", folder / "run" / "checkpoints"
    for number in range(kills + 1):
        before, newest = len(read_journal(journal)), max(complete_steps(checkpoints), default=0)
        process = start(folder, number, steps)
        if number < kills:
            # The run is divided into equal parts, one for each kill. Every second kill waits for a save.
            step = rng.randint(number * steps // kills, (number + 1) * steps // kills - 1)
            kill(process, journal, checkpoints, max(1, step), rng.uniform(0, 2 * pace), save=number % 2 == 1)
        else:
            assert processes.finish([process], seconds=900) == [0], process.text()
        done = [entry["step"] for entry in read_journal(journal)[before:]]
        assert not done or done[0] == newest + 1, (
            f"the run resumed from step {done[0] - 1}, not {newest}:\n{process.text()}"
        )
        outcomes.append({"from": newest, "to": max(done, default=newest), "in a save": is_saving(checkpoints)})
    return outcomes[:-1]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.large)])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path, kills):
    steps = max(12, 2 * kills)
    uninterrupted = start(tmp_path / "uninterrupted", 0, steps)
    assert processes.finish([uninterrupted], seconds=900) == [0], uninterrupted.text()
    expected = {entry["step"]: entry["loss"] for entry in read_journal(tmp_path / "uninterrupted" / "journal")}
    times = [entry["time"] for entry in read_journal(tmp_path / "uninterrupted" / "journal")]
    pace = statistics.median(after - before for before, after in itertools.pairwise(times))

    outcomes = killed_run(tmp_path / "killed", steps, kills, pace)
    print(f"{kills} kills of a run of {steps} steps, {pace:.2f} s each: {outcomes}")
    assert any(outcome["in a save"] for outcome in outcomes), "no kill fell into a save"
    assert len({outcome["to"] for outcome in outcomes}) >= kills // 2, "the kills are not spread over the run"

    entries = read_journal(tmp_path / "killed" / "journal")
    assert {entry["step"] for entry in entries} == set(expected) == set(range(1, steps + 1))
    # Steps that were done twice, before and after a kill, must have the same loss both times.
    for entry in entries:
        assert entry["loss"] == expected[entry["step"]], f"step {entry['step']}"
    states = [final_state(tmp_path / name / "run", steps) for name in ("uninterrupted", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def final_state(workdir: pathlib.Path, steps: int):
    """Returns weights and optimizer state of the last checkpoint."""
    config = experiment(steps)
    mesh = make_mesh(config.mesh, devices=jax.devices()[:2])
    with Checkpointer(workdir, config) as checkpointer:
        progress = checkpointer.latest()
        assert progress.step == steps
        abstract = abstract_state(config.model, config.stages[-1], mesh)
        return jax.device_get(checkpointer.restore(progress, abstract.params, abstract.opt_state))
