"""Runs an experiment: its stages one after the other, with checkpoints, logs, and a progress bar over all of them.

The same call on the same workdir resumes. Everything a step depends on is in the checkpoint or a function of the config
and the step's number (data, schedules), so an interrupted run ends in the very weights of an uninterrupted one.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from alignvlm_jax import config as configs
from alignvlm_jax.config import ExperimentConfig
from alignvlm_jax.data import pipeline, store
from alignvlm_jax.data.packing import Batch
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params, tokens_per_tile
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training import metrics, out_of_memory
from alignvlm_jax.training import step as steps
from alignvlm_jax.training.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    Checkpointer,
    Progress,
    history_of_run,
    is_checkpoint,
    write_history,
)
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer
from alignvlm_jax.training.profile import Profiler
from alignvlm_jax.training.stages import StageConfig, stage_table

TENSORBOARD_FOLDER = "tensorboard"

# Keys that may differ when a run is resumed: they change where and how often, never what is computed.
_MAY_DIFFER = (
    "checkpoint",
    "log_every_steps",
    "mesh",
    "profile",
    "data.root",
    "data.read_threads",
    "data.prefetch_batches",
)


class TrainingData(Protocol):
    """What the loop asks of the data."""

    def steps(self, stage: StageConfig) -> int:
        """How many steps a stage takes."""

    def batches(self, stage_index: int, stage: StageConfig, start_step: int) -> Iterator[Batch]:
        """The packed global batches of a stage from this step on."""

    def save_tokenizer(self, folder: Path) -> None:
        """Whatever it takes to read a checkpoint later."""


class ExperimentData:
    """The data sets, tokenizer and pipeline that a config names."""

    def __init__(self, config: ExperimentConfig):
        self._config = config
        self._chat = load_tokenizer(config)
        parts = [part for stage in config.stages for part in stage.mixture]
        root = Path(config.data.root)
        self._sources = {
            pipeline.source_name(part): store.open_dataset(root / part.dataset, part.split) for part in parts
        }

    def steps(self, stage: StageConfig) -> int:
        if stage.steps is not None:
            return stage.steps
        return math.ceil(stage.epochs * pipeline.steps_per_epoch(self._sources, stage.mixture, stage.global_batch))

    def batches(self, stage_index: int, stage: StageConfig, start_step: int) -> Iterator[Batch]:
        data = self._config.data
        dataset = pipeline.make_pipeline(
            self._sources,
            stage.mixture,
            self._chat,
            data.tiling,
            data.packing,
            global_batch=stage.global_batch,
            seed=int(np.random.SeedSequence((self._config.seed, stage_index)).generate_state(1)[0]),
            tokens_per_tile=tokens_per_tile(self._config.model),
            max_text_tokens=stage.max_text_tokens,
            max_turns=data.max_turns,
            max_image_pixels=data.max_image_pixels,
        )
        return pipeline.iterate(
            dataset, start_step=start_step, read_threads=data.read_threads, prefetch_batches=data.prefetch_batches
        )

    def save_tokenizer(self, folder: Path) -> None:
        self._chat.save(folder)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Attributes:
    params: the trained weights, where they lie on the mesh.
    progress: where the run ended, with the seconds it took over all sittings.
    """

    params: Params
    progress: Progress


def train(
    config: ExperimentConfig,
    workdir: str | Path,
    *,
    open_data: Callable[[ExperimentConfig], TrainingData] = ExperimentData,
    make_params: Callable[[ExperimentConfig], Params] = initial_parameters,
    on_stage_start: Callable[[int, Params], Any] | None = None,
    on_step: Callable[[int], Any] | None = None,
) -> TrainResult:
    """Trains through all stages, or goes on where an earlier call on `workdir` stopped.

    Args:
      config: the experiment.
      workdir: where everything goes; see `training/checkpoint.py`.
      open_data: where the batches come from.
      make_params: where the weights come from that stage 1 starts with.
      on_stage_start: called with the stage's index and the weights it starts from, also when resuming within it.
      on_step: called after each step with the number of steps done, over all stages.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved first.
      UserError: the config does not fit the data, the devices or their memory, or what `workdir` holds.
    """
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh)
    machine = metrics.Machine.of(mesh.devices.flatten())
    sharding.local_rows(mesh, config.data.packing.bins_per_microbatch)  # refuses what the mesh does not divide
    data = open_data(config)
    stages = [dataclasses.replace(stage, steps=data.steps(stage), epochs=None) for stage in config.stages]
    _prepare_workdir(workdir, config, data)
    with (
        jax.set_mesh(mesh),
        Checkpointer(workdir, config) as checkpointer,
        _Interruption() as interruption,
        Profiler(config.profile, workdir / TENSORBOARD_FOLDER) as profiler,
        out_of_memory.explained(config, workdir),
    ):
        run = _Run(config, stages, mesh, checkpointer, interruption, profiler, on_step)
        params, progress = run.resume() or (make_params(config), Progress())
        total = sum(stage.steps for stage in stages)
        with (
            tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True, smoothing=0.1) as bar,
            contextlib.closing(metrics.MetricsLog(workdir / TENSORBOARD_FOLDER, progress.step, machine)) as log,
        ):
            while progress.stage < len(stages):
                batches = data.batches(progress.stage, stages[progress.stage], progress.step_in_stage)
                state = run.begin_stage(progress, params)
                tqdm.write(stage_table(stages[progress.stage], state.params))
                if on_stage_start:
                    on_stage_start(progress.stage, state.params)
                state, progress = run.finish_stage(state, progress, batches, bar, log)
                params, progress = state.params, _next_stage(progress)
        return TrainResult(params, progress)


@dataclasses.dataclass
class _Run:
    """What stays the same from stage to stage."""

    config: ExperimentConfig
    stages: list[StageConfig]
    mesh: Mesh
    checkpointer: Checkpointer
    interruption: "_Interruption"
    profiler: Profiler
    on_step: Callable[[int], Any] | None

    def resume(self) -> tuple[Params | None, Progress] | None:
        """Where the last checkpoint leaves off, and the weights if that is the start of a stage; None without one."""
        progress = self.checkpointer.latest()
        if progress is None:
            return None
        stage = self.stages[progress.stage]
        done = progress.step_in_stage >= stage.steps
        if not done and self.checkpointer.has_optimizer(progress):
            return None, progress
        abstract = steps.abstract_state(self.config.model, stage, self.mesh)
        params = self.checkpointer.restore_params(progress, abstract.params)
        return params, _next_stage(progress) if done else progress

    def begin_stage(self, progress: Progress, params: Params | None) -> steps.TrainState:
        """The state to go on from: fresh from `params` at the start of a stage, else from the checkpoint."""
        stage = self.stages[progress.stage]
        if params is not None:
            return steps.place_state(self.config.model, stage, self.mesh, params)
        return self.checkpointer.restore(progress, steps.abstract_state(self.config.model, stage, self.mesh))

    def finish_stage(
        self,
        state: steps.TrainState,
        progress: Progress,
        batches: Iterator[Batch],
        bar: tqdm,
        log: metrics.MetricsLog,
    ) -> tuple[steps.TrainState, Progress]:
        """Trains to the end of the stage and saves."""
        stage = self.stages[progress.stage]
        train_step = steps.jit_train_step(self.config.model, stage, self.mesh)
        fields = steps.FIELDS + (steps.RESAMPLING_FIELDS if self.config.model.newline else ())
        bar.set_description(stage.name)
        started = time.monotonic() - progress.train_seconds
        first, measured = True, None
        log.begin_stage(metrics.step_flops(self.config.model, stage))
        while progress.step_in_stage < stage.steps:
            batch = next(batches)
            device_batch = sharding.shard_batch({name: batch[name] for name in fields}, self.mesh)
            jax.block_until_ready(measured)  # at most one step ahead of the device
            with self.profiler.step(progress.step + 1):
                state, measured = train_step(state, device_batch)
            progress = Progress(
                progress.step + 1, progress.stage, progress.step_in_stage + 1, time.monotonic() - started
            )
            self.profiler.after(progress.step, measured)
            log.add({**measured, **_host_counts(batch)})
            bar.update()
            at_end = progress.step_in_stage == stage.steps
            if at_end or progress.step % self.config.log_every_steps == 0:
                summary = log.write(progress.step, progress.stage)
                tqdm.write(metrics.line(progress.step, stage.name, summary))
                bar.set_postfix_str(f"loss {summary['loss']:.3f}")
            if first:  # the first step compiled: from here on it is speed
                jax.block_until_ready(measured)
                log.restart_clock()
                first = False
            if self.on_step:
                self.on_step(progress.step)
            interrupted = self.interruption.came
            if at_end or interrupted or progress.step % self.config.checkpoint.every_steps == 0:
                jax.block_until_ready(state)
                progress = dataclasses.replace(progress, train_seconds=time.monotonic() - started)
                self.checkpointer.save(progress, state)
            if interrupted:
                self.checkpointer.wait()
                tqdm.write(f"interrupted: saved after step {progress.step}; the same command goes on from there")
                raise KeyboardInterrupt
        return state, progress


def _next_stage(progress: Progress) -> Progress:
    return dataclasses.replace(progress, stage=progress.stage + 1, step_in_stage=0)


def _host_counts(batch: Batch) -> dict[str, float]:
    """What the pipeline counted: examples packed, cut short and refused."""
    names = {"examples": "num_examples", "cut": "num_cut", "refused": "num_refused"}
    return {name: float(batch[field].sum()) for name, field in names.items() if field in batch}


def _prepare_workdir(workdir: Path, config: ExperimentConfig, data: TrainingData) -> None:
    """Makes the workdir, or checks that the run in it is this one."""
    path = workdir / CONFIG_FILE
    try:
        if is_checkpoint(workdir):
            # Read as plain values: a key that this version no longer knows is a difference too.
            _refuse_other_run(configs.read_json(path), configs.to_dict(config), workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        data.save_tokenizer(workdir / TOKENIZER_FOLDER)
        if config.init_from is not None:
            write_history(workdir, history_of_run(config.init_from))
        path.write_text(configs.to_json(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error


def _refuse_other_run(old: Any, new: Any, workdir: Path) -> None:
    differences = [
        f"{key}: {before!r} there, {after!r} now"
        for key, before, after in _differences(old, new)
        if not any(key == name or key.startswith(f"{name}.") for name in _MAY_DIFFER)
    ]
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences[:3])}"
            f"{f'; and {len(differences) - 3} more' if len(differences) > 3 else ''}): choose another workdir"
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nests of dicts and lists differ, as (path, old, new)."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new


class _Interruption:
    """While in force, SIGINT and SIGTERM raise a flag: the step is finished and saved. A second one ends at once."""

    def __init__(self):
        self.came = False
        self._before = {}

    def __enter__(self) -> "_Interruption":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        tqdm.write("interrupted: finishing this step and saving (once more to stop at once)")
