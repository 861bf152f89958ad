"""The runs of a round, what is done to them, and what they are checked for; see tools/soak.py."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from alignvlm_jax.checkpoints import integrity
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import CHECKPOINTS_FOLDER, complete_steps
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.loading import load_config
from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.corpus import FEATURES, build_corpus
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.train_step import abstract_state

_PAGES = 400
_DAMAGED = 12  # of them
_DISK_MEGABYTES = 220
_EVENTS = ("kill", "kill", "kill", "sigterm", "sigterm", "disk")
_MOST_EVENTS = 6  # of a run: then it is left in peace
_MOST_SITTINGS = 10  # and has to come to its end
_LONGEST_SECONDS = 900  # of a sitting: whoever takes longer hangs (for one that never comes, others wait 300)
_CLOSE = 0.01  # losses on another mesh, relative
_MESHES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))


@dataclasses.dataclass
class Sitting:
    """What was done to one process, or to several as one, and what came of it.

    Attributes:
      event: "kill", "sigterm", "disk" (full, then a kill); "" for none.
      from_step: the newest whole step as it began.
      steps: so many were taken.
      codes: exit codes, one for each process.
      while_saving: whether an unfinished checkpoint was left behind.
      damaged: the file of the newest checkpoint that was spoilt before it began, and how.
      passed_over: whether it said that it passed a checkpoint over.
      saves_failed: so many, by what it said.
    """

    event: str
    mesh: tuple[int, int, int]
    processes: int
    damaged: str = ""
    from_step: int = 0
    steps: int = 0
    codes: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    seconds_to_stop: float = math.nan
    while_saving: bool = False
    passed_over: bool = False
    saves_failed: int = 0


def draw_documents(root: Path) -> Path:
    """A data root with a corpus of which some pictures cannot be decoded."""
    if store.is_occupied(root / "documents"):
        return root
    build_corpus(root / "sound", seed=0, sizes={"train": _PAGES})
    source, rng = store.open_dataset(root / "sound", "train"), random.Random(0)
    damaged = {index: rng.choice(("cut", "nonsense")) for index in rng.sample(range(_PAGES), _DAMAGED)}

    def records():
        for index in range(len(source)):
            record = source[index]
            picture = record["image"]
            how = damaged.get(index)
            picture = picture[: len(picture) // 2] if how == "cut" else b"no picture" if how else picture
            yield record | {"image": io.BytesIO(picture)}

    store.write_dataset(root / "documents", FEATURES, {"train": records()})
    return root


def play_round(folder: Path, data: Path, steps: int, rng: random.Random) -> dict[str, Any]:
    """A clean run and two to which things are done; what was done, and what was lost."""
    seed, mesh = rng.randrange(2**31), rng.choice(_MESHES)
    config = _config(data, steps, seed)
    clean = Run(folder / "clean", config, folder.parent / "cache")
    clean.folder.mkdir(parents=True)
    tqdm.write(f"{folder.name}: a clean run on mesh {_name(mesh)}")
    clean.sit(Sitting("", mesh, 1))
    if clean.surprises:
        raise RuntimeError(f"the clean run failed: {clean.surprises}")
    found = {"mesh": mesh, "seed": seed, "runs": {"clean": clean.report()}, "lost": [], "surprises": []}
    found["refused"] = len(clean.refused())
    for name in ("same", "another"):
        with _own_disk(folder / name / "disk") as disk:
            run = Run(folder / name, config, folder.parent / "cache", disk=disk, pace=clean)
            for number in range(_MOST_SITTINGS):
                event = "" if number >= _MOST_EVENTS else rng.choice(_EVENTS)
                if event == "disk" and disk is None:
                    event = "kill"
                chosen = mesh if name == "same" else rng.choice(_MESHES)
                two = name == "another" and math.prod(chosen) > 1 and rng.random() < 0.3
                sitting = Sitting(event, chosen, 2 if two else 1)
                if number and rng.random() < 0.3:
                    run.damage_newest(sitting, rng)
                run.sit(sitting, rng)
                tqdm.write(f"{folder.name}: {name}: {_line(sitting)}")
                if sitting.codes == [0] * len(sitting.codes):
                    break
            run.compare(clean, same_mesh=name == "same")
            found["runs"][name] = run.report()
            found["lost"] += [f"{folder.name}, {name}: {lost}" for lost in run.lost]
            found["surprises"] += [f"{folder.name}, {name}: {surprise}" for surprise in run.surprises]
            if run.lost and disk:
                shutil.copytree(disk / "run", folder / name / "run")
    return found


class Run:
    """A run in a folder of its own: its sittings, one after the other.

    Attributes:
      lost: what must not happen.
      surprises: sittings that ended by themselves, which another one makes good.
    """

    def __init__(
        self,
        folder: Path,
        config: ExperimentConfig,
        cache: Path,
        disk: Path | None = None,
        pace: "Run | None" = None,
    ):
        self.folder, self._config, self._cache, self._disk = folder, config, cache, disk
        self.workdir = (disk or folder) / "run"
        self.sittings: list[Sitting] = []
        self.lost: list[str] = []
        self.surprises: list[str] = []
        self.difference = 0.0
        self._pace, self._began = pace, 0.0

    def report(self) -> dict[str, Any]:
        steps = max(self._journal(), default=0)
        sittings = [dataclasses.asdict(sitting) for sitting in self.sittings]
        return {"steps": steps, "largest_loss_difference": self.difference, "sittings": sittings}

    def damage_newest(self, sitting: Sitting, rng: random.Random) -> None:
        """Spoils one file of the newest checkpoint, if there is another to fall back to."""
        undamaged = self._undamaged()
        if len(undamaged) < 2:
            return
        step = self._checkpoints / str(undamaged[-1])
        path = rng.choice(sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size))
        content, how = path.read_bytes(), rng.choice(("flipped", "cut", "deleted"))
        place = rng.randrange(len(content))
        if how == "flipped":
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        elif how == "cut":
            path.write_bytes(content[:place])
        else:
            path.unlink()
        sitting.damaged = f"{path.relative_to(self._checkpoints)} {how}"

    def sit(self, sitting: Sitting, rng: random.Random | None = None) -> None:
        """Starts the run, or starts it again, and does to it what is to be done."""
        number = len(self.sittings)
        self.sittings.append(sitting)
        sitting.from_step = max(self._undamaged(), default=0)
        began = time.monotonic()
        self._began = self._began or began
        processes = self._start(number, sitting)
        try:
            if sitting.event:
                self._strike(sitting, processes, rng)
            sitting.codes = [process.wait(_LONGEST_SECONDS) for process in processes]
        except subprocess.TimeoutExpired:
            self.lost.append(f"sitting {number} hangs")
            sitting.codes = [-1] * len(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        sitting.seconds = round(time.monotonic() - began, 1)
        self._look(number, sitting)

    def compare(self, clean: "Run", same_mesh: bool) -> None:
        """Notes what is not as it was in the clean run."""
        mine, theirs = self._journal(), clean._journal()
        for step, notes in theirs.items():
            expected, found = notes[0], mine.get(step, {}).values()
            # Of two processes one may have been killed before it noted its rows.
            if any(not _is_part(note, expected) for note in found):
                self.lost.append(f"step {step} had another batch")
            if not any(_is_part(expected, note) for note in found):
                self.lost.append(f"step {step} was not taken")
        before = dict(clean._losses())
        differences = [abs(loss - before[step]) / before[step] for step, loss in self._losses()]
        self.difference = max(differences)
        if self.difference > (0 if same_mesh else _CLOSE):
            self.lost.append(f"losses differ by {self.difference:.3g}")
        if same_mesh and not self._ends_as(clean):
            self.lost.append("weights, optimizer or places in the data differ in the end")

    def refused(self) -> set[str]:
        """The examples that were refused."""
        notes = (note for of_step in self._journal().values() for note in of_step.values())
        return {name for note in notes for name in note["refused"]}

    def seconds_to_begin(self) -> float:
        """How long the first sitting took to its first step."""
        return self._times()[0] - self._began

    def seconds_of_step(self) -> float:
        """Of the first sitting, as a rule."""
        return statistics.median(after - before for before, after in itertools.pairwise(self._times()))

    def _times(self) -> list[float]:
        return [notes[0]["time"] for _, notes in sorted(self._journal().items()) if 0 in notes]

    def _undamaged(self) -> list[int]:
        whole = complete_steps(self._checkpoints)
        return [step for step in whole if not integrity.damage(self._checkpoints / str(step))]

    @property
    def _journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

    def _output(self, number: int, process: int) -> Path:
        return self.folder / f"output{number}.{process}.txt"

    @property
    def _checkpoints(self) -> Path:
        return self.workdir / CHECKPOINTS_FOLDER

    def _start(self, number: int, sitting: Sitting) -> list[subprocess.Popen]:
        config = dataclasses.replace(self._config, mesh=MeshConfig(*sitting.mesh))
        file = self.folder / f"config{number}.json"
        file.write_text(config_to_json(config), encoding="utf-8")
        arguments = dict(config=str(file), workdir=str(self.workdir), journal=str(self._journal_file), sitting=number)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(math.prod(sitting.mesh) // sitting.processes),
            "JAX_COMPILATION_CACHE_DIR": str(self._cache.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "NPROC": "64",  # threads of XLA's: devices that wait for each other block some
            "PYTHONUNBUFFERED": "1",
        }
        port, processes = _free_port(), []
        for process in range(sitting.processes):
            if sitting.processes > 1:
                arguments["joins"] = [f"localhost:{port}", sitting.processes, process]
            command = [sys.executable, str(Path(__file__).with_name("sitting.py")), json.dumps(arguments)]
            with self._output(number, process).open("w") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
        return processes

    def _strike(self, sitting: Sitting, processes: list[subprocess.Popen], rng: random.Random) -> None:
        """Waits for a random moment, seldom before the first step, and strikes."""
        number = len(self.sittings) - 1
        if rng.random() < 0.15:
            _wait(rng.uniform(0, self._pace.seconds_to_begin()), processes)
        else:
            self._wait_for(number, "step [0-9]+ ", processes)
            _wait(rng.uniform(0, 12 * self._pace.seconds_of_step()), processes)
        if sitting.event == "disk":
            filler = _fill(self._disk)
            self._wait_for(number, "could not be saved", processes, seconds=30 * self._pace.seconds_of_step())
            filler.unlink()
            _wait(rng.uniform(0, 12 * self._pace.seconds_of_step()), processes)
        asked = time.monotonic()
        if sitting.event == "sigterm":
            for process in processes if rng.random() < 0.5 else processes[:1]:
                process.send_signal(signal.SIGTERM)
        else:
            rng.choice(processes).kill()
        for process in processes:
            process.wait(_LONGEST_SECONDS)
        sitting.seconds_to_stop = round(time.monotonic() - asked, 2)

    def _look(self, number: int, sitting: Sitting) -> None:
        """Notes what came of a sitting, and what should not have."""
        outputs = [self._output(number, process) for process in range(sitting.processes)]
        text = "".join(output.read_text(errors="replace") for output in outputs)
        sitting.passed_over = "is skipped: " in text
        sitting.saves_failed = len(re.findall("warning: step [0-9]+ could not be saved", text))
        whole = {str(step) for step in complete_steps(self._checkpoints)}
        sitting.while_saving = any(path.name not in whole for path in self._checkpoints.glob("*"))
        taken = [step for step, notes in sorted(self._journal().items()) if number in notes]
        sitting.steps = len(taken)
        if taken and taken[0] != sitting.from_step + 1:
            self.lost.append(f"sitting {number} went on from step {taken[0] - 1}, not {sitting.from_step}")
        in_training = "memory of each device" in text
        fine = {
            "": _all_ended(sitting, 0),
            "kill": -signal.SIGKILL in sitting.codes or _all_ended(sitting, 0),
            "disk": -signal.SIGKILL in sitting.codes or _all_ended(sitting, 0, 2, 4),
            "sigterm": _all_ended(sitting, 75, 0) or not in_training,
        }[sitting.event]
        if not fine:
            last = next((line.strip() for line in reversed(outputs[0].read_text().splitlines()) if line.strip()), "")
            self.surprises.append(f"sitting {number} ({sitting.event}) ended with {sitting.codes}: {last[-300:]}")
        if sitting.damaged and in_training and not sitting.passed_over:
            self.lost.append(f"sitting {number} did not see that {sitting.damaged}")

    def _wait_for(self, number: int, pattern: str, processes: list[subprocess.Popen], seconds: float = 600) -> None:
        """Until the first process has said it, or any is gone, or so many seconds have passed."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self._output(number, 0).read_text(errors="replace")):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                return
            time.sleep(0.05)

    def _ends_as(self, other: "Run") -> bool:
        """Whether both ended in the same weights, optimizer and places in the data."""
        states = [run._final_state() for run in (self, other)]
        same = jax.tree.map(np.array_equal, *(state for state, _ in states))
        return all(jax.tree.leaves(same)) and states[0][1] == states[1][1]

    def _final_state(self) -> tuple[Any, Any]:
        mesh = make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
        with Checkpointer(self.workdir, self._config) as checkpointer:
            progress = checkpointer.latest()
            abstract = abstract_state(self._config.model, self._config.stages[-1], mesh)
            state = checkpointer.restore(progress, abstract.params, abstract.opt_state)
            return jax.device_get(state), checkpointer.data_state(progress)

    def _journal(self) -> dict[int, dict[int, dict[str, Any]]]:
        """Of each step, what each sitting that took it noted: by step, then by sitting, all processes together."""
        text = self._journal_file.read_text(encoding="utf-8") if self._journal_file.is_file() else ""
        found: dict[int, dict[int, dict[str, Any]]] = {}
        for line in map(json.loads, text.splitlines()):
            notes = found.setdefault(line["step"], {})
            note = notes.setdefault(line["sitting"], {"rows": {}, "refused": set(), "time": line["time"]})
            note["rows"] |= line["rows"]
            note["refused"] |= set(line["refused"])
        return found

    def _losses(self) -> list[tuple[int, float]]:
        """Step and loss, as every sitting said them."""
        texts = [self._output(number, 0).read_text(errors="replace") for number in range(len(self.sittings))]
        found = [re.findall(r"^step (\d+) \w+ \| loss ([\d.]+)", text, re.MULTILINE) for text in texts]
        return [(int(step), float(loss)) for of_sitting in found for step, loss in of_sitting]


def _is_part(note: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    return note["rows"].items() <= whole["rows"].items() and note["refused"] <= whole["refused"]


def _all_ended(sitting: Sitting, *codes: int) -> bool:
    return all(code in codes for code in sitting.codes)


def _config(data: Path, steps: int, seed: int) -> ExperimentConfig:
    """A short run of the nano model: two stages of two kinds, saved every third step.

    Its rates are a tenth of the demo's. At the full ones a last bit, which is another on every mesh, now and then grows
    to a quarter of the loss within 20 steps of AdamW, and losses could not be held against each other.
    """
    config = load_config("configs/nano.py")
    first, _, last = (_slowed(stage) for stage in config.stages)
    adamw = dataclasses.replace(first.optimizer, name="adamw")
    first = dataclasses.replace(first, steps=steps - steps // 3, warmup_steps=4, global_batch=4, optimizer=adamw)
    last = dataclasses.replace(last, steps=steps // 3, warmup_steps=4, global_batch=4)
    packing = dataclasses.replace(config.data.packing, tokens_per_bin=288, tiles_per_bin=2)  # a page a bin
    return dataclasses.replace(
        config,
        seed=seed,
        data=dataclasses.replace(config.data, root=str(data.absolute()), packing=packing, max_refused=0.5),
        stages=(first, last),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=3, keep=2),
        log_every_steps=1,
    )


def _slowed(stage: StageConfig) -> StageConfig:
    rates = {part: rate / 10 for part, rate in vars(stage.learning_rates).items()}
    return dataclasses.replace(stage, learning_rates=type(stage.learning_rates)(**rates))


@contextlib.contextmanager
def _own_disk(folder: Path) -> Iterator[Path | None]:
    """A small file system mounted there; None where that is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MEGABYTES}m", "none", str(folder)]
    try:
        allowed = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        allowed = False
    try:
        yield folder if allowed else None
    finally:
        if allowed:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """Writes a file until no byte is left."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def _wait(seconds: float, processes: Sequence[subprocess.Popen]) -> None:
    """So long, or until one of them is gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _name(mesh: Sequence[int]) -> str:
    return "x".join(map(str, mesh))


def _line(sitting: Sitting) -> str:
    damaged = f", {sitting.damaged}" if sitting.damaged else ""
    return (
        f"from step {sitting.from_step}{damaged} on mesh {_name(sitting.mesh)} of {sitting.processes}: {sitting.steps} "
        f"steps in {sitting.seconds} s; {sitting.event or 'left in peace'}, ended with {sitting.codes}"
    )
