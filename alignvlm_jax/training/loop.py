"""Runs an experiment: its stages one after the other, with checkpoints, logs, and a progress bar over all of them.

Calling `train` again on the same workdir resumes the run. Everything that a step depends on is stored in the checkpoint
(weights, optimizer, position in the data) or is a function of the config and the number of the step (schedules). An
interrupted run therefore ends with exactly the weights of an uninterrupted one.

With several processes (`parallel/distributed.py`), each of them calls `train`. A process makes the rows of the batch
and saves the shards of the weights that its devices hold. Only process 0 prints and writes the other files. A signal
to any process stops all of them after the same step.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.refusals import RefusalLog
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.leases.lease import Lease
from alignvlm_jax.locations import open_location
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.parallel import distributed, sharding
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.parallel.writing import one_writer_of
from alignvlm_jax.progress import progress_bar
from alignvlm_jax.training import budget, metrics, out_of_memory
from alignvlm_jax.training.anomalies import ANOMALIES_FILE, AnomalyWatch
from alignvlm_jax.training.experiment_data import ExperimentData, TrainingData
from alignvlm_jax.training.initial import initial_parameters
from alignvlm_jax.training.interruption import Interruption
from alignvlm_jax.training.pinning import pin_sources
from alignvlm_jax.training.profile import Profiler
from alignvlm_jax.training.resumption import Resumption
from alignvlm_jax.training.run_folder import prepare_workdir, with_recorded_grouping
from alignvlm_jax.training.stage_plans import describe_plan, plan_stages, planned_stage
from alignvlm_jax.training.stages import stage_table
from alignvlm_jax.training.tracking import tensorboard, trackers
from alignvlm_jax.training.tracking.tracker import ShownAnswer
from alignvlm_jax.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
      params: the trained weights, placed on the mesh.
      progress: steps done, and the seconds they took over all sessions.
    """

    params: Params
    progress: Progress


@ordinary_modes()
def train(
    config: ExperimentConfig,
    workdir: str | Path,
    *,
    open_data: Callable[[ExperimentConfig], TrainingData] = ExperimentData,
    make_params: Callable[[ExperimentConfig], Params] = initial_parameters,
    on_stage_start: Callable[[int, Params], Any] | None = None,
    on_step: Callable[[int], Any] | None = None,
    score: Callable[[Params, Mesh], Mapping[str, float]] | None = None,
    answer: Callable[[Params, Mesh], Sequence[ShownAnswer]] | None = None,
    log_to: Sequence[str] = trackers.DEFAULT,
    allow_config_change: Sequence[str] = (),
) -> TrainResult:
    """Trains through all stages, or resumes the run in `workdir`.

    With several processes, all of them must call it, within `distributed.initialized`.

    Args:
      config: the experiment.
      workdir: folder of the run; see `checkpoints/workdir.py`.
      open_data: opens the data that the batches come from.
      make_params: makes the weights that stage 1 starts with.
      on_stage_start: called with the stage's index and the weights before its first step in this session.
      on_step: called after each step with the number of steps done, over all stages.
      score: called every `config.evaluation.every_steps` steps with the weights and the mesh they are placed on. The
        scores it returns are logged. `evaluation.during_training` makes such a function.
      answer: called every `config.evaluation.log_answers_every_steps` steps like `score`. The trackers show the answers
        that it returns.
      log_to: names of the trackers, from `training.tracking.trackers.KINDS`.
      allow_config_change: keys of the config that may differ from the earlier config of the run.

    Returns:
      The trained weights and the progress.

    Raises:
      distributed.Interrupted: on SIGINT, or on SIGTERM (`Preempted`); the run is saved first.
      UserError: if the config does not fit the data, the devices, their memory, or the run in `workdir`.
      InUseError: if another run is writing to `workdir`.
      LeaseLostError: if another run took over while this one was cut off from `workdir`.
      distributed.MismatchError: if the processes differ in their config, libraries or devices.
    """
    workdir = open_location(workdir)
    # Check this first, because processes with different configs would wait for each other forever.
    distributed.require_equal({"config": config_to_dict(config)})
    config = with_recorded_grouping(pin_sources(config, workdir), workdir)
    mesh = make_mesh(config.mesh)
    machine = metrics.Machine.from_devices(mesh.devices.flatten())
    rows = sharding.local_rows(mesh, config.data.packing.bins_per_microbatch)
    data = open_data(config)
    with (
        # Before anything in the folder is read or deleted.
        one_writer_of(workdir) as lease,
        jax.set_mesh(mesh),
        Checkpointer(workdir, config, lease) as checkpointer,
        Interruption() as interruption,
        Profiler(config.profile, workdir / tensorboard.FOLDER) as profiler,
        out_of_memory.explain_errors(config, workdir),
    ):
        prepare_workdir(workdir, config, data, allow_config_change)
        # Plan the stages.
        plans = plan_stages(config, data, checkpointer)
        stages = [planned_stage(config, stage, plan) for stage, plan in zip(config.stages, plans, strict=True)]

        # Find where the run starts or resumes.
        anomalies_file = workdir / ANOMALIES_FILE if distributed.is_primary() else None
        anomalies = AnomalyWatch(config.anomalies, anomalies_file, distributed.log)
        resumption = Resumption(config, stages, mesh, checkpointer, make_params)
        refusals = RefusalLog(workdir / _refusals_file())
        distributed.log(budget.describe(config, stages, mesh, workdir))
        params, progress = resumption.find_start()
        if progress.step:
            anomalies.load_state(checkpointer.data_state(progress) or {})

        # Train the stages, one after the other.
        with (
            _progress_bar(sum(stage.steps for stage in stages), progress.step) as bar,
            trackers.open_trackers(
                log_to if distributed.is_primary() else (), workdir, config_to_dict(config), first_step=progress.step
            ) as tracked,
        ):
            trainer = Trainer(
                config=config,
                stages=stages,
                plans=plans,
                mesh=mesh,
                workdir=workdir,
                resumption=resumption,
                checkpointer=checkpointer,
                interruption=interruption,
                profiler=profiler,
                refusals=refusals,
                anomalies=anomalies,
                log=metrics.MetricsLog(tracked, machine),
                trackers=tracked,
                bar=bar,
                on_step=functools.partial(_finish_step, lease, on_step),
                score=score,
                answer=answer,
            )
            while progress.stage < len(stages):
                index, stage, plan = progress.stage, stages[progress.stage], plans[progress.stage]
                # Position in the data: None unless the run resumes within the stage.
                row_states = resumption.row_states(progress)
                with contextlib.closing(data.batches(index, stage, plan, row_states, rows)) as batches:
                    state = resumption.make_state(progress, params)
                    distributed.log(stage_table(stage, state.params))
                    distributed.log(describe_plan(config, plan))
                    if on_stage_start:
                        on_stage_start(index, state.params)
                    state, progress = trainer.train_stage(state, progress, batches)
                params, progress = state.params, progress.next_stage()
        return TrainResult(params, progress)


def _finish_step(lease: Lease, on_step: Callable[[int], Any] | None, step: int) -> None:
    """Ends the run soon after it has lost its lease, and calls `on_step`."""
    lease.raise_if_lost()
    if on_step:
        on_step(step)


def _refusals_file() -> str:
    """Returns the name of this process's file of refused examples. Processes do not share one file."""
    return "data_refused.jsonl" if distributed.is_primary() else f"data_refused.{jax.process_index()}.jsonl"


def _progress_bar(total: int, done: int) -> tqdm:
    # Without a terminal, the line that is logged every few steps says the same.
    show = distributed.is_primary()
    return progress_bar(total=total, initial=done, unit="step", smoothing=0.1, show=show, lines=False)
