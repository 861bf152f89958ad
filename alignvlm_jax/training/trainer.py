"""Trains one stage of a run: a step at a time, with checks, logs, scores and checkpoints in between.

The host stays at most one step ahead of the devices. It never waits for the step it has just started: metrics are read
when they are logged, and anomalies are noticed one step late.

With several processes, all run the same loop and make the same calls in the same order, because many of the calls wait
for every process.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32
from tqdm import tqdm

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.feeding import BatchIterator
from alignvlm_jax.data.packing import Batch
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.data.refusals import RefusalLog
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.parallel import distributed, sharding
from alignvlm_jax.progress import exclude_first_step
from alignvlm_jax.training import debug, metrics, remat_choice
from alignvlm_jax.training.anomalies import ANOMALIES_FILE, AnomalyWatch
from alignvlm_jax.training.interruption import Interruption
from alignvlm_jax.training.profile import Profiler
from alignvlm_jax.training.resumption import Resumption
from alignvlm_jax.training.tracking.tracker import ShownAnswer
from alignvlm_jax.training.tracking.trackers import Trackers
from alignvlm_jax.training.train_step import (
    Metrics,
    TrainState,
    TrainStep,
    batch_fields,
    jit_train_step,
    make_train_step,
)


class _Signals(NamedTuple):
    """Stop signals received by all processes before the step.

    With several processes the values are arrays that are still being computed.

    Attributes:
      interrupted: number of processes that were told to stop.
      preempted: number of processes that were told to stop because of a preemption.
    """

    interrupted: Any
    preempted: Any


@dataclasses.dataclass
class _StageRun:
    """Mutable state of the loop over the steps of one stage.

    Attributes:
      stage: the stage, with its number of steps filled in.
      train_step: its jitted step; None before the first batch.
      batches: its batches.
      state: weights and optimizer; None only while a rollback replaces them.
      progress: steps done.
      last_batch: number of the newest batch, counted from 1 over the whole stage, skipped batches included.
      start_time: value of `time.monotonic` that training time is measured from. Earlier sessions move it back, scoring
        moves it forward.
      measured: metrics of the newest step, on the devices; None before the first step and after a rollback.
      is_compiled: True once the first step is done.
    """

    stage: StageConfig
    train_step: TrainStep | None
    batches: BatchIterator
    state: TrainState | None
    progress: Progress
    last_batch: int
    start_time: float
    measured: Metrics | None = None
    is_compiled: bool = False

    @property
    def is_finished(self) -> bool:
        """True once all steps of the stage are done."""
        return self.progress.step_in_stage >= self.stage.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains the stages of a run, one call of `train_stage` per stage.

    Attributes:
      config: the experiment.
      stages: its stages, with their numbers of steps filled in.
      plans: the plans of the stages, saved with every checkpoint.
      mesh: devices of all processes.
      workdir: folder of the run.
      resumption: provides the state to continue with after a rollback.
      checkpointer: saves the run.
      interruption: tells whether this process was told to stop.
      profiler: traces some of the steps.
      refusals: log of the examples that cannot be used.
      anomalies: watches the loss and the skipped updates.
      log: log of the metrics.
      trackers: where scores and answers go.
      bar: progress bar over all stages.
      on_step: called after each step with the number of steps done, over all stages.
      score: scores the weights on the mesh.
      answer: answers questions with the weights on the mesh.
    """

    config: ExperimentConfig
    stages: list[StageConfig]
    plans: list[StagePlan]
    mesh: Mesh
    workdir: Path
    resumption: Resumption
    checkpointer: Checkpointer
    interruption: Interruption
    profiler: Profiler
    refusals: RefusalLog
    anomalies: AnomalyWatch
    log: metrics.MetricsLog
    trackers: Trackers
    bar: tqdm
    on_step: Callable[[int], Any] | None = None
    score: Callable[[Params, Mesh], Mapping[str, float]] | None = None
    answer: Callable[[Params, Mesh], Sequence[ShownAnswer]] | None = None

    def train_stage(self, state: TrainState, progress: Progress, batches: BatchIterator) -> tuple[TrainState, Progress]:
        """Trains from `progress` to the end of its stage, and saves.

        Args:
          state: weights and optimizer at `progress`. They are donated to the first step.
          progress: steps done.
          batches: the remaining batches of the stage.

        Returns:
          The state and the progress at the end of the stage.

        Raises:
          distributed.Interrupted: if any process received a signal; the run is saved first.
          UserError: if updates are skipped again and again, or if the run cannot be saved.
        """
        run = self._start_stage(state, progress, batches)
        while not run.is_finished:
            batch, data_seconds = self._next_batch(run)
            # Queue the sums before the step. Devices run programs in order, so the sums then do not wait for the step.
            counts, signals = self._sum_over_processes(batch)
            # The copy overlaps with the previous step, which the devices may still be computing.
            device_batch = sharding.shard_batch({name: batch[name] for name in self._fields}, self.mesh)
            self._run_step(run, device_batch)
            has_failed = self._check_anomalies(run, batch, device_batch)
            self._log_step(run, counts, data_seconds)
            if self.on_step:
                self.on_step(run.progress.step)
            stop = self._should_stop(signals)
            if not stop and (self._maybe_score(run) + self._maybe_show_answers(run)):
                stop = self._should_stop(signals)  # a signal may have arrived meanwhile
            has_failed = has_failed or self._maybe_save(run, must_save=run.is_finished or stop is not None)
            if has_failed:
                self._roll_back(run)
            elif stop:
                self._finish_saving(run)
                raise stop
        return run.state, run.progress

    def _start_stage(self, state: TrainState, progress: Progress, batches: BatchIterator) -> _StageRun:
        stage = self.stages[progress.stage]
        self.bar.set_description(stage.name)
        run = _StageRun(
            stage,
            None,
            batches,
            state,
            progress,
            last_batch=progress.step_in_stage + self.anomalies.num_skipped_batches(progress.stage),
            start_time=time.monotonic() - progress.train_seconds,
        )
        self.log.begin_stage(metrics.step_flops(self.config.model, stage))
        return run

    def _next_batch(self, run: _StageRun) -> tuple[Batch, float]:
        """Returns the next batch on the host, and the seconds that the loop waited for it."""
        start_time = time.monotonic()
        batch = next(run.batches)
        run.last_batch += 1
        return batch, time.monotonic() - start_time

    def _sum_over_processes(self, batch: Batch) -> tuple[dict[str, Any], _Signals]:
        """Sums the example counts of the batch and the received signals over all processes.

        With several processes the sums are arrays that are still being computed; this method does not wait for them.
        """
        sums = distributed.sum_over_processes(
            {
                **_batch_counts(batch, self._counted_rows),
                "interrupted": float(self.interruption.interrupted),
                "preempted": float(self.interruption.preempted),
            }
        )
        signals = _Signals(sums.pop("interrupted"), sums.pop("preempted"))
        return sums, signals

    def _run_step(self, run: _StageRun, device_batch: Mapping[str, jax.Array]) -> None:
        """Waits for the previous step and starts the next one."""
        # Keeps the host at most one step ahead, so batches do not pile up in device memory.
        jax.block_until_ready(run.measured)
        start_time = time.monotonic()
        if run.train_step is None:
            run.train_step = self._make_step(run.stage, run.state, device_batch)
        if not run.is_compiled:
            distributed.log(f"compiling the step of {run.stage.name} ...")
        with self.profiler.step(run.progress.step + 1):
            # The call returns when the step is compiled and queued, not when it is done.
            run.state, run.measured = run.train_step(run.state, device_batch)
        if not run.is_compiled:
            distributed.log(f"compiling ... {time.monotonic() - start_time:.0f} s")
        run.progress = Progress(
            step=run.progress.step + 1,
            stage=run.progress.stage,
            step_in_stage=run.progress.step_in_stage + 1,
            train_seconds=time.monotonic() - run.start_time,
        )
        self.profiler.after(run.progress.step, run.measured)

    def _make_step(self, stage: StageConfig, state: TrainState, device_batch: Mapping[str, jax.Array]) -> TrainStep:
        """Returns the jitted step of a stage, with the least recomputation that fits if the config says "auto"."""
        model = self.config.model
        make_step = functools.partial(
            jit_train_step,
            stage=stage,
            mesh=self.mesh,
            gradient_dtype=self.config.mesh.gradient_dtype,
            branch_tokens=self.config.data.branch_tokens,
        )
        if not remat_choice.is_auto(model):
            return make_step(model)
        arguments = (state, dict(device_batch))
        return remat_choice.choose_step(model, stage, self.mesh, make_step, arguments, self.workdir)

    def _check_anomalies(self, run: _StageRun, batch: Batch, device_batch: Mapping[str, jax.Array]) -> bool:
        """Checks the step before the newest one; returns True if too many updates in a row were skipped."""
        # The lookup communicates between processes, so it is deferred until the step turns out to be an anomaly.
        names = functools.partial(_example_names, batch, run.batches)
        self.anomalies.add(run.progress.step, run.measured, names)
        has_failed = self.anomalies.check(before=run.progress.step)
        # Reading "skipped" waits for the step, so checking for NaNs costs the overlap of host and devices.
        if self.config.debug.nans and float(run.measured["skipped"]):
            train_step = make_train_step(self.config.model, run.stage, branch_tokens=self.config.data.branch_tokens)
            debug.explain_skipped(train_step, self.mesh, run.state, device_batch, run.progress.step)
        return has_failed

    def _log_step(self, run: _StageRun, counts: Mapping[str, Any], data_seconds: float) -> None:
        """Collects what the step measured and, every `log_every_steps` steps, writes a summary."""
        self.log.add({**run.measured, **counts, "data_seconds": data_seconds})
        self.refusals.add(run.batches.refused())
        if run.is_compiled:
            self.bar.update()
        else:
            # The first step includes compilation. Speeds and the time left are measured from the second step on.
            jax.block_until_ready(run.measured)
            self.log.restart_clock()
            exclude_first_step(self.bar)
            run.is_compiled = True
        step = run.progress.step
        if run.is_finished or step % self.config.log_every_steps == 0:
            summary = self.log.write(step, run.progress.stage)
            steps_left = sum(stage.steps for stage in self.stages) - step
            distributed.log(metrics.format_line(step, run.stage.name, summary, steps_left))
            self.bar.set_postfix_str(f"loss {summary['loss']:.3f}")

    def _should_stop(self, signals: _Signals) -> type[distributed.Interrupted] | None:
        """Returns the exception that ends the run after this step, or None."""
        interrupted, preempted = signals
        if jax.process_count() == 1:
            # A single process need not agree with others, so it also acts on a signal that arrived during the step.
            interrupted, preempted = self.interruption.interrupted, self.interruption.preempted
        if not interrupted:
            return None
        return distributed.Preempted if preempted else distributed.Interrupted

    def _maybe_score(self, run: _StageRun) -> bool:
        """Scores the weights if a scoring is due, and logs the scores; returns whether it did."""
        step = run.progress.step
        if not self.score or step % self.config.evaluation.every_steps:
            return False
        jax.block_until_ready(run.state.params)
        start_time = time.monotonic()
        scores = self.score(run.state.params, self.mesh)
        split = self.config.evaluation.split
        self.trackers.log(step, {f"{split}/{name}": value for name, value in scores.items()})
        seconds = time.monotonic() - start_time
        text = " | ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())
        distributed.log(f"step {step} {split} | {text} | scored in {seconds:.0f} s")
        self._exclude_pause(run, seconds)
        return True

    def _maybe_show_answers(self, run: _StageRun) -> bool:
        """Answers a few questions if that is due, and shows the answers in the trackers; returns whether it did."""
        every_steps = self.config.evaluation.log_answers_every_steps
        if not self.answer or every_steps is None or run.progress.step % every_steps:
            return False
        jax.block_until_ready(run.state.params)
        start_time = time.monotonic()
        answers = self.answer(run.state.params, self.mesh)
        self.trackers.log_answers(run.progress.step, self.config.evaluation.split, answers)
        self._exclude_pause(run, time.monotonic() - start_time)
        return True

    def _exclude_pause(self, run: _StageRun, seconds: float) -> None:
        """Excludes a pause of the training from its time and from its speed."""
        self.log.restart_clock()
        run.start_time += seconds

    def _maybe_save(self, run: _StageRun, must_save: bool) -> bool:
        """Saves if `must_save` or if a checkpoint is due; returns True if too many updates in a row were skipped."""
        if not must_save and run.progress.step % self.config.checkpoint.every_steps:
            return False
        # A checkpoint must not hide a failure, so the newest step is checked now instead of one step late.
        jax.block_until_ready(run.state)
        if self.anomalies.check(before=run.progress.step + 1):
            # A failure that is noticed one step late has used up one more batch. Also take it here, so that the batches
            # that the rollback skips do not depend on when checkpoints are saved.
            self._next_batch(run)
            return True
        # Do not save between consecutive failures: a rollback must return to a step before the first of them.
        if must_save or not self.anomalies.num_skipped_in_a_row:
            run.progress = dataclasses.replace(run.progress, train_seconds=time.monotonic() - run.start_time)
            params, opt_state = run.state.params, run.state.opt_state
            self.checkpointer.save(run.progress, params, opt_state, self._data_state(run.batches), self.log.last)
        return False

    def _data_state(self, batches: BatchIterator) -> dict[str, Any]:
        """Returns what a checkpoint stores about the data: plans, the state of all rows, and the skipped batches."""
        rows = {}
        for process_rows in distributed.gather_json(batches.state()):
            rows |= process_rows
        plans = [dataclasses.asdict(plan) for plan in self.plans]
        return {"plans": plans, "rows": rows, **self.anomalies.state()}

    def _roll_back(self, run: _StageRun) -> None:
        """Returns to the last checkpoint, and skips the batches between it and the newest step.

        Raises:
          UserError: if the config says to stop instead, if earlier rollbacks did not help, or if the last checkpoint
            belongs to the previous stage.
        """
        # Reasons to give up instead.
        config, failed = self.config.anomalies, run.progress
        reason = (
            f"{config.max_skipped} updates in a row were skipped by step {failed.step}: no finite loss or gradients"
        )
        # Free the device memory before the checkpoint is restored into it.
        run.state, run.measured = None, None
        if config.then == "stop":
            raise UserError(
                f"{reason}; {ANOMALIES_FILE} lists the examples (config.anomalies.then=rollback skips them)"
            )
        params, progress = self.resumption.find_start()
        if progress.stage != failed.stage:
            raise UserError(
                f"{reason}, and the newest checkpoint belongs to the stage before (step {progress.step}), because the "
                "end of that stage was not saved. Run the same command again to resume from it"
            )
        if self.anomalies.num_rollbacks_to(progress.stage, progress.step_in_stage) >= config.max_rollbacks:
            raise UserError(
                f"{reason}, after {config.max_rollbacks} rollbacks to step {progress.step}. Try "
                "--config.debug.nans=true, a lower learning rate, or an earlier checkpoint"
            )

        # Continue from the checkpoint. The iterator over the batches is not rewound, so the batches since then are
        # skipped; they are recorded, because a resumed run must skip them, too.
        self.anomalies.skip_batches(progress.stage, progress.step_in_stage, run.last_batch)
        distributed.log(
            f"warning: {reason}; back to step {progress.step}, continuing after batch number {run.last_batch}"
        )
        run.state, run.progress = self.resumption.make_state(progress, params), progress
        self.bar.n = progress.step
        self.trackers.rewind(progress.step)

    def _finish_saving(self, run: _StageRun) -> None:
        """Waits until the run is saved and tells the user how to resume it."""
        self.checkpointer.wait()
        distributed.log(f"interrupted: saved after step {run.progress.step}; run the same command again to resume")

    @functools.cached_property
    def _fields(self) -> tuple[str, ...]:
        """Fields of a batch that the training step reads."""
        return batch_fields(self.config.model, is_tree=self.config.data.branch_tokens is not None)

    @functools.cached_property
    def _counted_rows(self) -> Bool[np.ndarray, " b"]:
        """Mask of this process's rows: True where this process counts the row, so that no row is counted twice."""
        return sharding.is_first_holder(self.mesh, self.config.data.packing.bins_per_microbatch)


def _batch_counts(batch: Batch, rows: Bool[np.ndarray, " b"]) -> dict[str, float]:
    """Returns the number of answers in these rows, and of examples that were packed, truncated and refused."""
    names = {"examples": "num_examples", "cut": "num_cut", "refused": "num_refused"}
    counts = {name: float(batch[field][:, rows].sum()) for name, field in names.items() if field in batch}
    return counts | {"answers": float(_count_answers(batch["loss_weights"][:, rows]))}


def _count_answers(loss_weights: Float32[np.ndarray, "K b L"]) -> int:
    """Returns the number of answers: of runs of targets with weight. The end of an answer is followed by none."""
    is_learned = loss_weights > 0
    is_first = is_learned[..., 1:] & ~is_learned[..., :-1]
    return np.count_nonzero(is_first) + np.count_nonzero(is_learned[..., 0])


def _example_names(batch: Batch, batches: BatchIterator) -> list[str]:
    """Returns the names of the examples in the global batch. All processes must call it."""
    numbers = np.unique(batch["example_ids"])
    # Unused entries are -1.
    names = distributed.gather_json([batches.name(int(number)) for number in numbers if number >= 0])
    return sorted({name for process_names in names for name in process_names})
