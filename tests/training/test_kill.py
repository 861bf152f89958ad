"""A run that is killed (kill -9) at random moments, saves in progress included, and started again until it is done."""

import dataclasses
import itertools
import json
import pathlib
import random
import time

import jax
import numpy as np
import pytest

from alignvlm_jax.training import checkpoint
from alignvlm_jax.training.optimizer import OptimizerConfig
from alignvlm_jax.training.retention import CheckpointConfig
from tests.parallel import processes, tiny

MESH = (8, 1, 1)


def experiment(steps: int):
    """Half of it with AdamW, half with Muon, saved after every step."""
    config = tiny.config(MESH)
    (stage,) = config.stages
    stages = tuple(
        dataclasses.replace(stage, name=name, steps=steps // 2, optimizer=OptimizerConfig(name=name))
        for name in ("adamw", "muon")
    )
    return dataclasses.replace(config, stages=stages, checkpoint=CheckpointConfig(every_steps=1, keep=2))


class Journal(dict):
    """The losses of `tiny.train`, written down one by one as they come: {"step": 3, "loss": [hexadecimal, refused]}."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("ab", buffering=0)

    def __setitem__(self, step, value):
        loss, refused = value
        self._file.write(json.dumps({"step": step, "loss": [float(loss).hex(), refused]}).encode() + b"\n")


def read(path: pathlib.Path) -> list[tuple[int, list]]:
    """Every step that was taken, in the order in which it was, with what was heard of it."""
    entries = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [(entry["step"], entry["loss"]) for entry in entries]


def unfinished(checkpoints: pathlib.Path) -> bool:
    """Whether there is a step that is not complete: one that is being saved."""
    complete = {str(step) for step in checkpoint.complete_steps(checkpoints)}
    return any(path.name not in complete for path in checkpoints.glob("*"))


def kill(process, journal: pathlib.Path, checkpoints: pathlib.Path, step: int, wait: float, save: bool) -> None:
    """Kills the process so many seconds after it took a step; or then, in the middle of its next save."""

    def until(condition):
        while not condition() and process.process.poll() is None:
            time.sleep(0.001)

    until(lambda: any(taken >= step for taken, _ in read(journal)))
    time.sleep(wait)
    if save:
        until(lambda: unfinished(checkpoints))
    process.process.kill()
    process.process.wait()


def run_to_the_end(folder: pathlib.Path, steps: int, kills: int, pace: float):
    """Starts the run, kills it and starts it again; what each kill left behind."""
    rng, found = random.Random(0), []
    workdir, journal = folder / "run", folder / "journal"
    checkpoints = workdir / "checkpoints"
    for number in range(kills + 1):
        before = read(journal)
        newest = max(checkpoint.complete_steps(checkpoints), default=0)
        (process,) = processes.start(
            folder / str(number), "steps", 1, devices=8, workdir=str(workdir), journal=str(journal), steps=steps
        )
        if number < kills:  # spread over all of it, some before the first step is saved
            step = rng.randint(number * steps // kills, (number + 1) * steps // kills - 1)
            kill(process, journal, checkpoints, max(1, step), rng.uniform(0, 2 * pace), save=number % 2 == 1)
        else:
            assert processes.finish([process], seconds=300) == [0], process.text()
        taken = [step for step, _ in read(journal)[len(before) :]]
        assert not taken or taken[0] == newest + 1, f"it went on from {taken[0] - 1}, not {newest}:\n{process.text()}"
        found.append({"step": max(taken, default=0), "from": newest, "saving": unfinished(checkpoints)})
    return found[:-1]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.large)])
def test_killed_at_random_moments_it_ends_in_the_same_weights(tmp_path, kills):
    steps = 4 * kills
    losses, times = {}, []
    whole = tiny.train(
        tmp_path / "whole", experiment(steps), losses=losses, made=[], on_step=lambda _: times.append(time.monotonic())
    )
    pace = float(np.median([after - before for before, after in itertools.pairwise(times)]))
    found = run_to_the_end(tmp_path, steps, kills, pace)
    print(f"{kills} kills of a run of {steps} steps, {pace:.2f} s each: {found}")
    assert any(left["saving"] for left in found), "no kill fell into a save"
    assert len({left["step"] for left in found}) >= kills // 2, "they were to be spread over the run"

    expected = {step: [float(loss).hex(), refused] for step, (loss, refused) in losses.items()}
    taken = read(tmp_path / "journal")
    assert dict(taken) == expected and all(expected[step] == heard for step, heard in taken)
    assert checkpoint.complete_steps(tmp_path / "run" / "checkpoints") == [steps - 1, steps]
    states = [final_state(tmp_path / name, experiment(steps)) for name in ("whole", "run")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    jax.tree.map(np.testing.assert_array_equal, states[1].params, jax.device_get(whole.params))


def final_state(workdir, config):
    """Weights and optimizer of the last checkpoint."""
    from alignvlm_jax.parallel.mesh import make_mesh
    from alignvlm_jax.training.step import abstract_state

    with checkpoint.Checkpointer(workdir, config) as checkpointer:
        progress = checkpointer.latest()
        abstract = abstract_state(config.model, config.stages[-1], make_mesh(config.mesh))
        return jax.device_get(checkpointer.restore(progress, abstract))
