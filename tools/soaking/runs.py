"""Starts the runs of a round, causes their failures, and checks that nothing is lost; see tools/soak.py."""

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
from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.corpus import FEATURES, build_corpus
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.train_step import abstract_state

_PAGES = 400
_DAMAGED = 12  # damaged pages among them
_DISK_MEGABYTES = 220
_EVENTS = ("kill", "kill", "kill", "sigterm", "sigterm", "disk")
_MAX_EVENTS = 6  # number of sessions with a failure; later sessions have none
_MAX_SESSIONS = 10  # number of sessions in which a run must finish
_MAX_SECONDS = 900  # a session that takes longer hangs (processes wait 300 s for one that never starts)
_CLOSE = 0.01  # largest relative difference of losses on different meshes
_MESHES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))


@dataclasses.dataclass
class Session:
    """One invocation of a run: the failure that was caused, and the result.

    Attributes:
      event: the failure: "kill", "sigterm", "disk" (a full disk, then a kill), or "" for none.
      mesh: sizes of the mesh.
      processes: number of processes.
      damaged: file of the newest checkpoint that was damaged before the start, and the kind of damage; "" for none.
      from_step: the newest undamaged step at the start.
      steps: number of steps taken.
      codes: exit codes, one for each process.
      seconds: duration.
      seconds_to_stop: time from the failure to the end of all processes.
      while_saving: whether an unfinished checkpoint was left behind.
      passed_over: whether the log says that a checkpoint was skipped.
      saves_failed: number of failed saves in the log.
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
    """Writes a corpus with some images that cannot be decoded, and returns the data root."""
    if store.is_occupied(root / "documents"):
        return root
    build_corpus(root / "sound", seed=0, sizes={"train": _PAGES})
    source, rng = store.open_dataset(root / "sound", "train"), random.Random(0)
    damage = {index: rng.choice(("cut", "nonsense")) for index in rng.sample(range(_PAGES), _DAMAGED)}

    def records():
        for index in range(len(source)):
            record = source[index]
            image = record["image"]
            kind = damage.get(index)
            image = image[: len(image) // 2] if kind == "cut" else b"no picture" if kind else image
            yield record | {"image": io.BytesIO(image)}

    store.write_dataset(root / "documents", FEATURES, {"train": records()})
    return root


def run_round(folder: Path, data: Path, steps: int, rng: random.Random) -> dict[str, Any]:
    """Executes a clean run and two runs with failures; returns the failures and everything that was lost.

    Args:
      folder: folder of the round.
      data: data root.
      steps: number of steps of each run.
      rng: source of all random choices.
    """
    # The clean run, whose batches, losses and weights the others are compared with.
    seed, mesh = rng.randrange(2**31), rng.choice(_MESHES)
    config = _config(data, steps, seed)
    clean = Run(folder / "clean", config, folder.parent / "cache")
    clean.folder.mkdir(parents=True)
    tqdm.write(f"{folder.name}: a clean run on mesh {_name(mesh)}")
    clean.run_session(Session("", mesh, 1))
    if clean.surprises:
        raise RuntimeError(f"the clean run failed: {clean.surprises}")
    result = {"mesh": mesh, "seed": seed, "runs": {"clean": clean.report()}, "lost": [], "surprises": []}
    result["refused"] = len(clean.refused())

    # The runs with failures. The last sessions have none, so that the run finishes.
    for name in ("same", "another"):
        with _small_disk(folder / name / "disk") as disk:
            run = Run(folder / name, config, folder.parent / "cache", disk=disk, pace=clean)
            for number in range(_MAX_SESSIONS):
                event = "" if number >= _MAX_EVENTS else rng.choice(_EVENTS)
                if event == "disk" and disk is None:
                    event = "kill"
                session_mesh = mesh if name == "same" else rng.choice(_MESHES)
                has_two_processes = name == "another" and math.prod(session_mesh) > 1 and rng.random() < 0.3
                session = Session(event, session_mesh, 2 if has_two_processes else 1)
                if number and rng.random() < 0.3:
                    run.damage_newest(session, rng)
                run.run_session(session, rng)
                tqdm.write(f"{folder.name}: {name}: {_describe(session)}")
                if session.codes == [0] * len(session.codes):
                    break
            run.compare(clean, same_mesh=name == "same")
            result["runs"][name] = run.report()
            result["lost"] += [f"{folder.name}, {name}: {lost}" for lost in run.lost]
            result["surprises"] += [f"{folder.name}, {name}: {surprise}" for surprise in run.surprises]
            if run.lost and disk:
                # The small disk is unmounted after the run: keep the evidence.
                shutil.copytree(disk / "run", folder / name / "run")
    return result


class Run:
    """A run in its own folder, and its sessions in order.

    Attributes:
      folder: folder of journal, configs and outputs.
      workdir: workdir of the run, on the small disk if there is one.
      sessions: the sessions so far.
      lost: descriptions of what was lost, which must not happen.
      surprises: descriptions of sessions that ended unexpectedly, which the next session must repair.
      difference: largest relative difference of a loss from the clean run.
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
        self.sessions: list[Session] = []
        self.lost: list[str] = []
        self.surprises: list[str] = []
        self.difference = 0.0
        self._pace, self._start_time = pace, 0.0  # `pace` is the run whose speed the failures are timed by

    def report(self) -> dict[str, Any]:
        """Returns the results of the run for the report."""
        steps = max(self._journal(), default=0)
        sessions = [dataclasses.asdict(session) for session in self.sessions]
        return {"steps": steps, "largest_loss_difference": self.difference, "sittings": sessions}

    def damage_newest(self, session: Session, rng: random.Random) -> None:
        """Damages one file of the newest checkpoint, if there is an older one that the run can use instead."""
        undamaged = self._undamaged()
        if len(undamaged) < 2:
            return
        step = self._checkpoints / str(undamaged[-1])
        path = rng.choice(sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size))
        content, kind = path.read_bytes(), rng.choice(("flipped", "cut", "deleted"))
        position = rng.randrange(len(content))
        if kind == "flipped":
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        elif kind == "cut":
            path.write_bytes(content[:position])
        else:
            path.unlink()
        session.damaged = f"{path.relative_to(self._checkpoints)} {kind}"

    def run_session(self, session: Session, rng: random.Random | None = None) -> None:
        """Starts or restarts the run, causes the failure of the session, and checks the result."""
        number = len(self.sessions)
        self.sessions.append(session)
        session.from_step = max(self._undamaged(), default=0)
        start_time = time.monotonic()
        self._start_time = self._start_time or start_time
        processes = self._start(number, session)
        try:
            if session.event:
                self._cause_failure(session, processes, rng)
            session.codes = [process.wait(_MAX_SECONDS) for process in processes]
        except subprocess.TimeoutExpired:
            self.lost.append(f"session {number} hangs")
            session.codes = [-1] * len(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        session.seconds = round(time.monotonic() - start_time, 1)
        self._check(number, session)

    def compare(self, clean: "Run", same_mesh: bool) -> None:
        """Records every difference from the clean run in `lost`."""
        mine, theirs = self._journal(), clean._journal()
        for step, notes in theirs.items():
            expected, actual = notes[0], mine.get(step, {}).values()
            # A note may be incomplete: one of two processes may have been killed before it wrote its rows.
            if any(not _is_part(note, expected) for note in actual):
                self.lost.append(f"step {step} had another batch")
            if not any(_is_part(expected, note) for note in actual):
                self.lost.append(f"step {step} was not taken")
        clean_losses = dict(clean._losses())
        differences = [abs(loss - clean_losses[step]) / clean_losses[step] for step, loss in self._losses()]
        self.difference = max(differences)
        if self.difference > (0 if same_mesh else _CLOSE):
            self.lost.append(f"losses differ by {self.difference:.3g}")
        if same_mesh and not self._has_same_end(clean):
            self.lost.append("weights, optimizer or positions in the data differ at the end")

    def refused(self) -> set[str]:
        """Returns the examples that were refused."""
        notes = (note for session_notes in self._journal().values() for note in session_notes.values())
        return {name for note in notes for name in note["refused"]}

    def seconds_to_first_step(self) -> float:
        """Time from the start of the first session to its first step."""
        return self._times()[0] - self._start_time

    def seconds_per_step(self) -> float:
        """Median duration of a step in the first session."""
        return statistics.median(after - before for before, after in itertools.pairwise(self._times()))

    def _times(self) -> list[float]:
        """Returns the times at which the first session finished its steps."""
        return [notes[0]["time"] for _, notes in sorted(self._journal().items()) if 0 in notes]

    def _undamaged(self) -> list[int]:
        """Returns the complete checkpoints whose files are not damaged, in order."""
        steps = complete_steps(self._checkpoints)
        return [step for step in steps if not integrity.damage(self._checkpoints / str(step))]

    @property
    def _journal_file(self) -> Path:
        return self.folder / "journal.jsonl"

    def _output(self, number: int, process: int) -> Path:
        return self.folder / f"output{number}.{process}.txt"

    @property
    def _checkpoints(self) -> Path:
        return self.workdir / CHECKPOINTS_FOLDER

    def _start(self, number: int, session: Session) -> list[subprocess.Popen]:
        """Starts the processes of a session."""
        config = dataclasses.replace(self._config, mesh=MeshConfig(*session.mesh))
        file = self.folder / f"config{number}.json"
        file.write_text(config_to_json(config), encoding="utf-8")
        arguments = dict(config=str(file), workdir=str(self.workdir), journal=str(self._journal_file), sitting=number)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(math.prod(session.mesh) // session.processes),
            "JAX_COMPILATION_CACHE_DIR": str(self._cache.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "NPROC": "64",  # threads of XLA; devices that wait for each other block some of them
            "PYTHONUNBUFFERED": "1",
        }
        port, processes = _free_port(), []
        for process in range(session.processes):
            if session.processes > 1:
                arguments["distributed"] = [f"localhost:{port}", session.processes, process]
            command = [sys.executable, str(Path(__file__).with_name("session.py")), json.dumps(arguments)]
            with self._output(number, process).open("w") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
        return processes

    def _cause_failure(self, session: Session, processes: list[subprocess.Popen], rng: random.Random) -> None:
        """Waits for a random moment, seldom before the first step, and causes the failure of the session."""
        number = len(self.sessions) - 1
        if rng.random() < 0.15:
            _wait(rng.uniform(0, self._pace.seconds_to_first_step()), processes)
        else:
            self._wait_for(number, "step [0-9]+ ", processes)
            _wait(rng.uniform(0, 12 * self._pace.seconds_per_step()), processes)
        if session.event == "disk":
            filler = _fill(self._disk)
            self._wait_for(number, "could not be saved", processes, seconds=30 * self._pace.seconds_per_step())
            filler.unlink()
            _wait(rng.uniform(0, 12 * self._pace.seconds_per_step()), processes)
        failure_time = time.monotonic()
        if session.event == "sigterm":
            # Sometimes only one of two processes gets the signal. Both must stop.
            for process in processes if rng.random() < 0.5 else processes[:1]:
                process.send_signal(signal.SIGTERM)
        else:
            rng.choice(processes).kill()
        for process in processes:
            process.wait(_MAX_SECONDS)
        session.seconds_to_stop = round(time.monotonic() - failure_time, 2)

    def _check(self, number: int, session: Session) -> None:
        """Records the result of a session, and everything that was lost or unexpected."""
        # Read the output, the checkpoints and the journal.
        outputs = [self._output(number, process) for process in range(session.processes)]
        text = "".join(output.read_text(errors="replace") for output in outputs)
        session.passed_over = "is skipped: " in text
        session.saves_failed = len(re.findall("warning: step [0-9]+ could not be saved", text))
        complete = {str(step) for step in complete_steps(self._checkpoints)}
        session.while_saving = any(path.name not in complete for path in self._checkpoints.glob("*"))
        taken = [step for step, notes in sorted(self._journal().items()) if number in notes]
        session.steps = len(taken)

        # Check them.
        if taken and taken[0] != session.from_step + 1:
            self.lost.append(f"session {number} resumed from step {taken[0] - 1}, not {session.from_step}")
        in_training = "memory of each device" in text
        # A kill or a signal may arrive after the end of the run, or before there is anything to save.
        has_expected_codes = {
            "": _all_ended(session, 0),
            "kill": -signal.SIGKILL in session.codes or _all_ended(session, 0),
            "disk": -signal.SIGKILL in session.codes or _all_ended(session, 0, 2, 4),
            "sigterm": _all_ended(session, 75, 0) or not in_training,
        }[session.event]
        if not has_expected_codes:
            last = next((line.strip() for line in reversed(outputs[0].read_text().splitlines()) if line.strip()), "")
            self.surprises.append(f"session {number} ({session.event}) ended with {session.codes}: {last[-300:]}")
        if session.damaged and in_training and not session.passed_over:
            self.lost.append(f"session {number} did not notice the damaged file: {session.damaged}")

    def _wait_for(self, number: int, pattern: str, processes: list[subprocess.Popen], seconds: float = 600) -> None:
        """Waits until the first process has printed the pattern, any process has ended, or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self._output(number, 0).read_text(errors="replace")):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                return
            time.sleep(0.05)

    def _has_same_end(self, other: "Run") -> bool:
        """Returns whether both runs ended with the same weights, optimizer and positions in the data."""
        states = [run._final_state() for run in (self, other)]
        same = jax.tree.map(np.array_equal, *(state for state, _ in states))
        return all(jax.tree.leaves(same)) and states[0][1] == states[1][1]

    def _final_state(self) -> tuple[Any, Any]:
        """Returns the training state and the positions in the data at the end of the run."""
        mesh = make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
        with Checkpointer(self.workdir, self._config) as checkpointer:
            progress = checkpointer.latest()
            abstract = abstract_state(self._config.model, self._config.stages[-1], mesh)
            state = checkpointer.restore(progress, abstract.params, abstract.opt_state)
            return jax.device_get(state), checkpointer.data_state(progress)

    def _journal(self) -> dict[int, dict[int, dict[str, Any]]]:
        """Returns the notes of the journal by step and session, with the rows of all processes merged."""
        text = self._journal_file.read_text(encoding="utf-8") if self._journal_file.is_file() else ""
        journal: dict[int, dict[int, dict[str, Any]]] = {}
        for line in map(json.loads, text.splitlines()):
            notes = journal.setdefault(line["step"], {})
            note = notes.setdefault(line["sitting"], {"rows": {}, "refused": set(), "time": line["time"]})
            note["rows"] |= line["rows"]
            note["refused"] |= set(line["refused"])
        return journal

    def _losses(self) -> list[tuple[int, float]]:
        """Returns the step and the loss of every logged line, over all sessions."""
        texts = [self._output(number, 0).read_text(errors="replace") for number in range(len(self.sessions))]
        matches = [re.findall(r"^step (\d+) \w+ \| loss ([\d.]+)", text, re.MULTILINE) for text in texts]
        return [(int(step), float(loss)) for session_matches in matches for step, loss in session_matches]


def _is_part(note: Mapping[str, Any], complete: Mapping[str, Any]) -> bool:
    return note["rows"].items() <= complete["rows"].items() and note["refused"] <= complete["refused"]


def _all_ended(session: Session, *codes: int) -> bool:
    return all(code in codes for code in session.codes)


def _config(data: Path, steps: int, seed: int) -> ExperimentConfig:
    """Returns the config of a short run of the nano model: two different stages, saved every third step.

    The learning rates are a tenth of the demo's. At the full rates, rounding differences between meshes sometimes grow
    to a quarter of the loss within 20 steps of AdamW, so that losses could not be compared.
    """
    config = load_config("configs/nano.py")
    first, _, last = (_with_lower_rates(stage) for stage in config.stages)
    adamw = dataclasses.replace(first.optimizer, name="adamw")
    first = dataclasses.replace(first, steps=steps - steps // 3, warmup_steps=4, global_batch=4, optimizer=adamw)
    last = dataclasses.replace(last, steps=steps // 3, warmup_steps=4, global_batch=4)
    packing = dataclasses.replace(config.data.packing, tokens_per_bin=288, tiles_per_bin=2)  # one page per bin
    return dataclasses.replace(
        config,
        seed=seed,
        data=dataclasses.replace(config.data, root=str(data.absolute()), packing=packing, max_refused=0.5),
        stages=(first, last),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=3, keep=2),
        log_every_steps=1,
    )


def _with_lower_rates(stage: StageConfig) -> StageConfig:
    rates = {part: rate / 10 for part, rate in vars(stage.learning_rates).items()}
    return dataclasses.replace(stage, learning_rates=type(stage.learning_rates)(**rates))


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """Mounts a small file system at a folder; yields None if that is not allowed."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MEGABYTES}m", "none", str(folder)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    try:
        yield folder if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """Writes a file until the disk is full."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


def _wait(seconds: float, processes: Sequence[subprocess.Popen]) -> None:
    """Waits for `seconds`, or until one of the processes has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _name(mesh: Sequence[int]) -> str:
    return "x".join(map(str, mesh))


def _describe(session: Session) -> str:
    damaged = f", {session.damaged}" if session.damaged else ""
    return (
        f"from step {session.from_step}{damaged} on mesh {_name(session.mesh)} with {session.processes} process(es): "
        f"{session.steps} steps in {session.seconds} s; {session.event or 'no failure'}, exit codes {session.codes}"
    )
