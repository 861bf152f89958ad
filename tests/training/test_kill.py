"""A run that is killed (kill -9) at random moments, also during saves, and restarted until it finishes."""

import dataclasses
import itertools
import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import complete_steps
from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.locations import open_location
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


@dataclasses.dataclass
class Run:
    """A run of `steps` steps.

    Attributes:
      folder: local folder for its journal and its output.
      workdir: its workdir, on a disk or in a bucket.
      steps: number of steps.
      num_processes: number of processes, which share two devices.
    """

    folder: pathlib.Path
    workdir: str
    steps: int
    num_processes: int = 1

    def start(self, name: object) -> list[processes.Process]:
        """Starts or resumes the run; `name` names the folder of this session's output."""
        journals = [str(self.folder / f"journal{i}") for i in range(self.num_processes)]
        return processes.start(
            self.folder / str(name),
            "train_with_journal",
            self.num_processes,
            devices=2 // self.num_processes,
            workdir=self.workdir,
            journal=journals,
            steps=self.steps,
        )

    def finish(self, name: object = "last") -> None:
        """Lets the run finish."""
        started = self.start(name)
        codes = processes.finish(started, seconds=900)
        assert codes == [0] * self.num_processes, started[0].text()

    def journal(self) -> list[dict]:
        """Returns the entries of the journal, in the order in which the steps were done."""
        file = self.folder / "journal0"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def checkpoints(self):
        return open_location(self.workdir) / "checkpoints"

    def is_saving(self) -> bool:
        """Returns whether some step is incomplete: it is being saved, or was when the process was killed."""
        complete = {str(step) for step in complete_steps(self.checkpoints())}
        # On a disk, a step has another name while it is written.
        return any(path.name not in complete for path in self.checkpoints().glob("*"))

    def pace(self) -> float:
        """Returns the median number of seconds between two steps."""
        times = [entry["time"] for entry in self.journal()]
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    def final_state(self):
        """Returns weights and optimizer state of the last checkpoint."""
        config = experiment(self.steps)
        mesh = make_mesh(config.mesh, devices=jax.devices()[:2])
        with Checkpointer(open_location(self.workdir), config) as checkpointer:
            progress = checkpointer.latest()
            assert progress.step == self.steps
            abstract = abstract_state(config.model, config.stages[-1], mesh)
            return jax.device_get(checkpointer.restore(progress, abstract.params, abstract.opt_state))


def wait_until(process: processes.Process, condition: Callable[[], bool]) -> None:
    """Waits until a condition holds or the process has ended."""
    while not condition() and process.process.poll() is None:
        time.sleep(0.001)


def wait_for_step(run: Run, process: processes.Process, step: int) -> None:
    """Waits until the run has done a step."""
    wait_until(process, lambda: any(entry["step"] >= step for entry in run.journal()))


def kill_runs(run: Run, kills: int, kill: Callable[[int, list[processes.Process], int], None]) -> list[dict]:
    """Starts and kills the run repeatedly, then lets it finish; returns where each kill left it.

    Args:
      run: the run.
      kills: number of kills.
      kill: called with the number of the kill, the processes that were just started, and a step. It returns when they
        are to be killed: after this step.
    """
    rng, outcomes = random.Random(0), []
    for number in range(kills + 1):
        before, newest = len(run.journal()), max(complete_steps(run.checkpoints()), default=0)
        started = run.start(number)
        if number < kills:
            # The run is divided into equal parts, one for each kill.
            step = rng.randint(number * run.steps // kills, (number + 1) * run.steps // kills - 1)
            kill(number, started, max(1, step))
            for process in started:
                process.process.kill()
                process.process.wait()
        else:
            assert processes.finish(started, seconds=900) == [0] * len(started), started[0].text()
        done = [entry["step"] for entry in run.journal()[before:]]
        assert not done or done[0] == newest + 1, (
            f"the run resumed from step {done[0] - 1}, not {newest}:\n{started[0].text()}"
        )
        outcomes.append({"from": newest, "to": max(done, default=newest), "in a save": run.is_saving()})
    return outcomes[:-1]


def assert_undisturbed(run: Run, undisturbed: Run) -> None:
    """Asserts that the losses of all steps, also of those done twice, and the final state are the same, bit for bit."""
    expected = {entry["step"]: entry["loss"] for entry in undisturbed.journal()}
    assert {entry["step"] for entry in run.journal()} == set(expected) == set(range(1, run.steps + 1))
    for entry in run.journal():
        assert entry["loss"] == expected[entry["step"]], f"step {entry['step']}"
    jax.tree.map(np.testing.assert_array_equal, undisturbed.final_state(), run.final_state())


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.large)])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path, kills):
    steps = max(12, 2 * kills)
    undisturbed, run = (Run(tmp_path / name, str(tmp_path / name / "run"), steps) for name in ("undisturbed", "killed"))
    undisturbed.finish()
    pace, rng = undisturbed.pace(), random.Random(1)

    def kill(number, started, step):
        wait_for_step(run, started[0], step)
        time.sleep(rng.uniform(0, 2 * pace))
        if number % 2 == 1:  # every second kill waits for the next save
            wait_until(started[0], run.is_saving)

    outcomes = kill_runs(run, kills, kill)
    print(f"{kills} kills of a run of {steps} steps, {pace:.2f} s each: {outcomes}")
    assert any(outcome["in a save"] for outcome in outcomes), "no kill fell into a save"
    assert len({outcome["to"] for outcome in outcomes}) >= kills // 2, "the kills are not spread over the run"
    assert_undisturbed(run, undisturbed)
