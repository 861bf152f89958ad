"""Runs an experiment: its stages one after the other, with checkpoints, logs, and a progress bar over all of them.

The same call on the same workdir resumes. Everything a step depends on is in the checkpoint (weights, optimizer, where
the data were) or a function of the config and the step's number (schedules), so an interrupted run ends in the very
weights of an uninterrupted one.

With several processes (`parallel/distributed.py`) each runs this, makes the rows of the batch that its devices hold,
and saves the shards that they hold. Process 0 alone prints, and writes what is not sharded. A signal to any of them
stops all after the same step.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool
from tqdm import tqdm

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.weights import history_of_run, write_history
from alignvlm_jax.checkpoints.workdir import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    Progress,
    complete_steps,
    read_meta,
)
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict, config_to_json, read_config_json
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.feeding import BatchIterator, RowStates
from alignvlm_jax.data.packing import Batch
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.data.refusals import RefusalLog
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.parallel import distributed, sharding
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training import budget, config_changes, debug, metrics, out_of_memory
from alignvlm_jax.training.anomalies import ANOMALIES_FILE, AnomalyWatch
from alignvlm_jax.training.experiment_data import ExperimentData, TrainingData
from alignvlm_jax.training.initial import initial_parameters
from alignvlm_jax.training.interruption import Interruption
from alignvlm_jax.training.profile import Profiler
from alignvlm_jax.training.stages import stage_table
from alignvlm_jax.training.train_step import (
    FIELDS,
    RESAMPLING_FIELDS,
    TrainState,
    abstract_state,
    jit_train_step,
    peak_learning_rates,
    place_state,
)

TENSORBOARD_FOLDER = "tensorboard"


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
    score: Callable[[Params, Mesh], Mapping[str, float]] | None = None,
    allow_config_change: Sequence[str] = (),
) -> TrainResult:
    """Trains through all stages, or goes on where an earlier call on `workdir` stopped.

    With several processes all call it, within `distributed.initialized`.

    Args:
      config: the experiment.
      workdir: where everything goes; see `checkpoints/workdir.py`.
      open_data: where the batches come from.
      make_params: where the weights come from that stage 1 starts with.
      on_stage_start: called with the stage's index and the weights it starts from, also when resuming within it.
      on_step: called after each step with the number of steps done, over all stages.
      score: called every `config.evaluation.every_steps` with the weights where they lie and the mesh; what it finds is
        logged. `evaluation.during_training` makes one.
      allow_config_change: keys of the config that need not be as they were when the run began.

    Raises:
      distributed.Interrupted: SIGINT, or SIGTERM (`Preempted`), came; the run was saved first.
      UserError: the config does not fit the data, the devices or their memory, or what `workdir` holds.
      distributed.MismatchError: the processes are not set up alike.
    """
    workdir = Path(workdir)
    distributed.require_equal({"config": config_to_dict(config)})
    mesh = make_mesh(config.mesh)
    machine = metrics.Machine.of(mesh.devices.flatten())
    rows = sharding.local_rows(mesh, config.data.packing.bins_per_microbatch)
    data = open_data(config)
    _prepare_workdir(workdir, config, data, allow_config_change)
    with (
        jax.set_mesh(mesh),
        Checkpointer(workdir, config) as checkpointer,
        Interruption() as interruption,
        Profiler(config.profile, workdir / TENSORBOARD_FOLDER) as profiler,
        out_of_memory.explained(config, workdir),
    ):
        plans = _plans(config, data, checkpointer)
        stages = [_planned(config, stage, plan) for stage, plan in zip(config.stages, plans, strict=True)]
        refusals = RefusalLog(workdir / _refusals_file())
        report = workdir / ANOMALIES_FILE if distributed.is_primary() else None
        anomalies = AnomalyWatch(config.anomalies, report, distributed.log)
        run = _Run(
            config,
            stages,
            plans,
            mesh,
            checkpointer,
            interruption,
            profiler,
            refusals,
            anomalies,
            make_params,
            on_step,
            score,
        )
        distributed.log(budget.describe(config, stages, mesh, workdir))
        params, progress = run.resume()
        if progress.step:
            anomalies.go_on_from(checkpointer.data_state(progress) or {})
        total = sum(stage.steps for stage in stages)
        events = workdir / TENSORBOARD_FOLDER if distributed.is_primary() else None
        with (
            _progress_bar(total, progress.step) as bar,
            contextlib.closing(metrics.MetricsLog(events, progress.step, machine)) as log,
        ):
            while progress.stage < len(stages):
                index, stage, plan = progress.stage, stages[progress.stage], plans[progress.stage]
                with contextlib.closing(data.batches(index, stage, plan, run.rows_at(progress), rows)) as batches:
                    state = run.begin_stage(progress, params)
                    distributed.log(stage_table(stage, state.params))
                    distributed.log(_describe(config, plan))
                    if on_stage_start:
                        on_stage_start(index, state.params)
                    state, progress = run.finish_stage(state, progress, batches, bar, log)
                params, progress = state.params, _next_stage(progress)
        return TrainResult(params, progress)


@dataclasses.dataclass
class _Run:
    """What stays the same from stage to stage."""

    config: ExperimentConfig
    stages: list[StageConfig]
    plans: list[StagePlan]
    mesh: Mesh
    checkpointer: Checkpointer
    interruption: Interruption
    profiler: Profiler
    refusals: RefusalLog
    anomalies: AnomalyWatch
    make_params: Callable[[ExperimentConfig], Params]
    on_step: Callable[[int], Any] | None
    score: Callable[[Params, Mesh], Mapping[str, float]] | None

    def resume(self) -> tuple[Params | None, Progress]:
        """Where the last checkpoint, or without one the run, starts, and the weights if it is the start of a stage."""
        progress = self.checkpointer.latest()
        if progress is None:
            return self.make_params(self.config), Progress()
        stage = self.stages[progress.stage]
        done = progress.step_in_stage >= stage.steps
        if not done and self.checkpointer.has_optimizer(progress):
            return None, progress
        abstract = abstract_state(self.config.model, stage, self.mesh)
        params = self.checkpointer.restore_params(progress, abstract.params)
        return params, _next_stage(progress) if done else progress

    def rows_at(self, progress: Progress) -> RowStates | None:
        """Where the rows of the data are at `progress`; None at the start of a stage."""
        if progress.step_in_stage == 0:
            return None
        data = self.checkpointer.data_state(progress)
        if data is None:
            raise UserError(
                f"the checkpoint at step {progress.step} does not say where the data were (an earlier version wrote "
                "it): start another run from it with --init-from"
            )
        return data["rows"]

    def begin_stage(self, progress: Progress, params: Params | None) -> TrainState:
        """The state to go on from: fresh from `params` at the start of a stage, else from the checkpoint."""
        stage = self.stages[progress.stage]
        if params is not None:
            return place_state(self.config.model, stage, self.mesh, params)
        abstract = abstract_state(self.config.model, stage, self.mesh)
        params, opt_state = self.checkpointer.restore(progress, abstract.params, abstract.opt_state)
        step = jax.device_put(np.int32(progress.step_in_stage), abstract.step.sharding)
        # Learning rates belong to the config, not to the checkpoint.
        return TrainState(step, params, opt_state, peak_learning_rates(stage, abstract.step.sharding))

    def finish_stage(
        self,
        state: TrainState,
        progress: Progress,
        batches: BatchIterator,
        bar: tqdm,
        log: metrics.MetricsLog,
    ) -> tuple[TrainState, Progress]:
        """Trains to the end of the stage and saves."""
        stage = self.stages[progress.stage]
        train_step = jit_train_step(self.config.model, stage, self.mesh)
        fields = FIELDS + (RESAMPLING_FIELDS if self.config.model.newline else ())
        bar.set_description(stage.name)
        started = time.monotonic() - progress.train_seconds
        counted_here = sharding.is_first_holder(self.mesh, self.config.data.packing.bins_per_microbatch)
        first, measured = True, None
        drawn = progress.step_in_stage + self.anomalies.num_left_out(progress.stage)
        log.begin_stage(metrics.step_flops(self.config.model, stage))
        while progress.step_in_stage < stage.steps:
            asked = time.monotonic()
            batch, drawn = next(batches), drawn + 1
            waited = time.monotonic() - asked
            # Before the step, so that asking for the sums does not wait for it.
            counts = distributed.sum_over_processes(
                {
                    **_host_counts(batch, counted_here),
                    "interrupted": float(self.interruption.came),
                    "preempted": float(self.interruption.preempted),
                }
            )
            # Copied to the device while that is still at work on the step before.
            device_batch = sharding.shard_batch({name: batch[name] for name in fields}, self.mesh)
            jax.block_until_ready(measured)  # at most one step ahead of the device
            with self.profiler.step(progress.step + 1):
                state, measured = train_step(state, device_batch)
            progress = Progress(
                progress.step + 1, progress.stage, progress.step_in_stage + 1, time.monotonic() - started
            )
            self.profiler.after(progress.step, measured)
            self.anomalies.add(progress.step, measured, functools.partial(_example_names, batch, batches))
            too_many = self.anomalies.look(before=progress.step)
            if self.config.debug.nans and float(measured["skipped"]):
                debug.explain_skipped(self.config.model, stage, self.mesh, state, device_batch, progress.step)
            signalled = counts.pop("interrupted"), counts.pop("preempted")
            log.add({**measured, **counts, "data_seconds": waited})
            self.refusals.add(batches.refused())
            bar.update()
            at_end = progress.step_in_stage == stage.steps
            if at_end or progress.step % self.config.log_every_steps == 0:
                summary = log.write(progress.step, progress.stage)
                distributed.log(metrics.line(progress.step, stage.name, summary))
                bar.set_postfix_str(f"loss {summary['loss']:.3f}")
            if first:  # the first step compiled: from here on it is speed
                jax.block_until_ready(measured)
                log.restart_clock()
                first = False
            if self.on_step:
                self.on_step(progress.step)
            interrupted, preempted = self._is_to_end(signalled)
            if self.score and not interrupted and progress.step % self.config.evaluation.every_steps == 0:
                started += self._score(state.params, progress, log)
                interrupted, preempted = self._is_to_end(signalled)
            must_save = at_end or interrupted
            to_save = must_save or progress.step % self.config.checkpoint.every_steps == 0
            if to_save and not too_many:
                jax.block_until_ready(state)
                if too_many := self.anomalies.look(before=progress.step + 1):
                    next(batches)  # left out too, as it would be had this been seen one step late, as usual
                    drawn += 1
                # Updates that fail lead back to before the first of them, not to one between.
                to_save = must_save or not self.anomalies.in_a_row
            if too_many:
                del state  # to make room
                failed, measured = progress, None
                params, progress = self._back_from(failed, drawn)
                state = self.begin_stage(progress, params)
                bar.n = progress.step
            elif to_save:
                progress = dataclasses.replace(progress, train_seconds=time.monotonic() - started)
                self.checkpointer.save(progress, state.params, state.opt_state, self._data_state(batches), log.last)
            if interrupted and not too_many:
                self.checkpointer.wait()
                distributed.log(f"interrupted: saved after step {progress.step}; the same command goes on from there")
                raise distributed.Preempted if preempted else distributed.Interrupted
        return state, progress

    def _is_to_end(self, signalled: tuple[Any, Any]) -> tuple[bool, bool]:
        """Whether to end after this step, and because of a preemption; `signalled` are sums from before the step."""
        if jax.process_count() == 1:  # what came since counts too
            return self.interruption.came, self.interruption.preempted
        interrupted, preempted = signalled
        return bool(interrupted), bool(preempted)

    def _back_from(self, failed: Progress, last_batch: int) -> tuple[Params | None, Progress]:
        """Where to go back to after too many skipped updates; the batches between there and here are left out.

        Raises:
          UserError: by config, or because it did not help before.
        """
        config = self.config.anomalies
        why = f"{config.max_skipped} updates in a row were skipped by step {failed.step}: no finite loss or gradients"
        if config.then == "stop":
            raise UserError(f"{why}; {ANOMALIES_FILE} has the examples (config.anomalies.then=rollback goes past them)")
        params, progress = self.resume()
        if progress.stage != failed.stage:
            raise UserError(
                f"{why}, and the newest checkpoint is one of the stage before (step {progress.step}): that at the end "
                "of it was not saved. The same command goes on from there"
            )
        if self.anomalies.returns_to(progress.stage, progress.step_in_stage) >= config.max_rollbacks:
            raise UserError(
                f"{why}, after going back to step {progress.step} {config.max_rollbacks} times. Try "
                "--config.debug.nans=true, a lower learning rate, or an earlier checkpoint"
            )
        self.anomalies.leave_out(progress.stage, progress.step_in_stage, last_batch)
        after = f"and on with the batches after number {last_batch}"
        distributed.log(f"warning: {why}; back to step {progress.step}, {after}")
        return params, progress

    def _score(self, params: Params, progress: Progress, log: metrics.MetricsLog) -> float:
        """Scores the weights and logs what is found; returns the seconds that training stood still."""
        jax.block_until_ready(params)
        began = time.monotonic()
        found = self.score(params, self.mesh)
        split = self.config.evaluation.split
        log.write_scalars(progress.step, {f"{split}/{name}": value for name, value in found.items()})
        seconds = time.monotonic() - began
        figures = " | ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        distributed.log(f"step {progress.step} {split} | {figures} | scored in {seconds:.0f} s")
        log.restart_clock()
        return seconds

    def _data_state(self, batches: BatchIterator) -> dict[str, Any]:
        """What is kept of the data with a checkpoint: plans, where the rows of all processes are, what was left out."""
        rows = {}
        for of_process in distributed.gather_json(batches.state()):
            rows |= of_process
        plans = [dataclasses.asdict(plan) for plan in self.plans]
        return {"plans": plans, "rows": rows, **self.anomalies.state()}


def _plans(config: ExperimentConfig, data: TrainingData, checkpointer: Checkpointer) -> list[StagePlan]:
    """The plans of the stages: those of the checkpoint; new ones if there is none, or data or stages have changed."""
    progress = checkpointer.latest()
    kept = checkpointer.data_state(progress) if progress else None
    if kept is not None:
        # Not by config.json: that has a change from the moment it was allowed, and a kill may have come since.
        changes = config_changes.compare(checkpointer.config(progress), config)
        if not any(change.matters and change.key.startswith(("stages", "data")) for change in changes):
            return [StagePlan(**plan) for plan in kept["plans"]]
    plans = [data.plan(index, stage) for index, stage in enumerate(config.stages)]
    # Every process has measured the same examples, if every one sees the same data sets.
    distributed.require_equal({"the data, as measured,": [dataclasses.asdict(plan) for plan in plans]})
    return plans


def _planned(config: ExperimentConfig, stage: StageConfig, plan: StagePlan) -> StageConfig:
    """The stage with its steps and their bins known."""
    bins = plan.microbatches * config.data.packing.bins_per_microbatch
    return dataclasses.replace(stage, steps=plan.steps, epochs=None, bins_per_step=bins)


def _describe(config: ExperimentConfig, plan: StagePlan) -> str:
    bins = plan.microbatches * config.data.packing.bins_per_microbatch
    return (
        f"a step: {plan.microbatches} x {config.data.packing.bins_per_microbatch} bins, about "
        f"{plan.examples_per_bin * bins:.0f} examples ({plan.examples_per_bin:.2f} a bin)"
    )


def _refusals_file() -> str:
    """Every process names the examples that it had to refuse, in a file of its own."""
    return "data_refused.jsonl" if distributed.is_primary() else f"data_refused.{jax.process_index()}.jsonl"


def _next_stage(progress: Progress) -> Progress:
    return dataclasses.replace(progress, stage=progress.stage + 1, step_in_stage=0)


def _progress_bar(total: int, done: int) -> tqdm:
    quiet = not distributed.is_primary()
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1, disable=quiet)


def _host_counts(batch: Batch, rows: Bool[np.ndarray, " b"]) -> dict[str, float]:
    """What the pipeline counted in these rows: examples packed, cut short and refused."""
    names = {"examples": "num_examples", "cut": "num_cut", "refused": "num_refused"}
    return {name: float(batch[field][:, rows].sum()) for name, field in names.items() if field in batch}


def _example_names(batch: Batch, batches: BatchIterator) -> list[str]:
    """The examples of a batch, all processes' rows; they must all ask."""
    numbers = np.unique(batch["example_ids"])
    of_processes = distributed.gather_json([batches.name(int(number)) for number in numbers if number >= 0])
    return sorted({name for names in of_processes for name in names})


def _prepare_workdir(
    workdir: Path, config: ExperimentConfig, data: TrainingData, allowed: Sequence[str]
) -> None:
    """Makes the workdir, or checks that the run in it is this one."""
    path, there = workdir / CONFIG_FILE, complete_steps(workdir / CHECKPOINTS_FOLDER)
    going_on = bool(there)
    if going_on:
        lost = not path.is_file()
        old = read_meta(workdir / CHECKPOINTS_FOLDER / str(there[-1]))["config"] if lost else read_config_json(path)
        changes = config_changes.compare(old, config)
        distributed.log(config_changes.describe(changes))
        config_changes.check(changes, allowed, workdir)
    text = config_to_json(config)
    distributed.gather_json("looked")  # before anything is written
    try:
        # A run that goes on under the same config writes nothing: a kill in between cannot spoil what is there.
        if distributed.is_primary() and not (going_on and not lost and path.read_text(encoding="utf-8") == text):
            workdir.mkdir(parents=True, exist_ok=True)
            data.save_tokenizer(workdir / TOKENIZER_FOLDER)
            if config.init_from is not None and not going_on:
                write_history(workdir, history_of_run(config.init_from))
            new = path.with_name(f".{path.name}.new")
            new.write_text(text, encoding="utf-8")
            new.replace(path)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error
    distributed.gather_json("written")
    distributed.require_equal({f"{workdir} is on storage that the host shares with process 0": path.is_file()})
