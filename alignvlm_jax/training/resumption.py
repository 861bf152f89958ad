"""Finds the step that a run resumes from, and builds the training state for it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.feeding import RowStates
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.training.train_step import TrainState, abstract_state, peak_learning_rates, place_state


@dataclasses.dataclass(frozen=True)
class Resumption:
    """Resumes a run from its newest checkpoint, or starts it if there is none.

    Attributes:
      config: the experiment.
      stages: its stages, with their numbers of steps filled in.
      mesh: devices that the weights are placed on.
      checkpointer: the run's checkpoints.
      make_params: makes the weights that stage 1 starts with.
    """

    config: ExperimentConfig
    stages: list[StageConfig]
    mesh: Mesh
    checkpointer: Checkpointer
    make_params: Callable[[ExperimentConfig], Params]

    def find_start(self) -> tuple[Params | None, Progress]:
        """Returns the weights and the progress to continue from.

        The weights are None if the run resumes within a stage; `make_state` then restores them with the optimizer.
        """
        progress = self.checkpointer.latest()
        if progress is None:
            return self.make_params(self.config), Progress()
        stage = self.stages[progress.stage]
        is_stage_done = progress.step_in_stage >= stage.steps
        if not is_stage_done and self.checkpointer.has_optimizer(progress):
            return None, progress
        # A new stage begins, with an optimizer of its own, so only the weights are restored.
        abstract = abstract_state(self.config.model, stage, self.mesh)
        params = self.checkpointer.restore_params(progress, abstract.params)
        return params, progress.next_stage() if is_stage_done else progress

    def row_states(self, progress: Progress) -> RowStates | None:
        """Returns the state of each row of the data at `progress`, or None at the start of a stage."""
        if progress.step_in_stage == 0:
            return None
        data = self.checkpointer.data_state(progress)
        if data is None:
            raise UserError(
                f"the checkpoint at step {progress.step} does not say where the data were, because an earlier version "
                "wrote it: start another run from it with --init-from"
            )
        return data["rows"]

    def make_state(self, progress: Progress, params: Params | None) -> TrainState:
        """Returns the training state at `progress`.

        Args:
          progress: where the run continues.
          params: weights at the start of a stage, which gets a new optimizer state. None restores weights and optimizer
            state from the checkpoint.
        """
        stage = self.stages[progress.stage]
        if params is not None:
            return place_state(self.config.model, stage, self.mesh, params)
        abstract = abstract_state(self.config.model, stage, self.mesh)
        params, opt_state = self.checkpointer.restore(progress, abstract.params, abstract.opt_state)
        step = jax.device_put(np.int32(progress.step_in_stage), abstract.step.sharding)
        # The learning rates come from the config, not from the checkpoint, because the user may have changed them.
        return TrainState(step, params, opt_state, peak_learning_rates(stage, abstract.step.sharding))
