"""Provides the data of an experiment to the training loop: the plan and the packed batches of each stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data import pipeline, store
from alignvlm_jax.data.examples import ExampleReader
from alignvlm_jax.data.feeding import BatchIterator, Feed, RowStates
from alignvlm_jax.data.page_scale import sample_scale
from alignvlm_jax.data.planning import StagePlan, plan_stage
from alignvlm_jax.locations import join
from alignvlm_jax.models.alignvlm import token_grid
from alignvlm_jax.parallel import distributed
from alignvlm_jax.training.initial import load_tokenizer


class TrainingData(Protocol):
    """Interface of the training loop to its data."""

    def plan(self, stage_index: int, stage: StageConfig) -> StagePlan:
        """Returns a stage's number of steps and of microbatches per step, which must be equal on all processes."""

    def batches(
        self, stage_index: int, stage: StageConfig, plan: StagePlan, state: RowStates | None, rows: Sequence[int]
    ) -> BatchIterator:
        """Returns the packed batches of a stage.

        Args:
          stage_index: index of the stage.
          stage: the stage.
          plan: its plan.
          state: state of the rows to resume from; None starts from the beginning.
          rows: the rows of each microbatch that this process builds.
        """

    def save_tokenizer(self, folder: Path) -> None:
        """Writes everything that is needed to decode the model's tokens."""

    def page_scale(self) -> float | None:
        """Returns the scale of the training pages (`data/page_scale.py`); None if there are none."""


class ExperimentData:
    """Data sets, tokenizer and input pipeline that the config of an experiment describes."""

    def __init__(self, config: ExperimentConfig):
        self._config = config
        self._chat = load_tokenizer(config)
        parts = [part for stage in config.stages for part in stage.mixture]
        # Open the data sets of all stages now, so that a missing one fails before training and not days into it.
        self._sources = {
            pipeline.source_name(part): store.open_dataset(join(config.data.root, part.dataset), part.split)
            for part in parts
        }

    def plan(self, stage_index: int, stage: StageConfig) -> StagePlan:
        """Plans a stage by measuring a sample of its examples (`data/planning.py`)."""
        return plan_stage(
            self._reader(stage_index, stage),
            global_batch=stage.global_batch,
            bins_per_step=stage.bins_per_step,
            steps=stage.steps,
            epochs=stage.epochs,
            # No workers run while a stage is planned, so the threads may use their cores.
            threads=max(self._config.data.read_threads, self._config.data.workers),
            progress=distributed.is_primary(),
        )

    def batches(
        self, stage_index: int, stage: StageConfig, plan: StagePlan, state: RowStates | None, rows: Sequence[int]
    ) -> BatchIterator:
        """Returns batches that threads or worker processes build ahead of time (`data/feeding.py`)."""
        data = self._config.data
        return Feed(
            self._reader(stage_index, stage),
            rows,
            plan.microbatches,
            state,
            num_positions=plan.num_positions,
            workers=data.workers,
            threads=data.read_threads,
            prefetch=data.prefetch_batches,
            max_refused=data.max_refused,
        )

    def _reader(self, stage_index: int, stage: StageConfig) -> ExampleReader:
        return pipeline.make_reader(
            self._sources,
            stage.mixture,
            self._chat,
            self._config.data,
            seed=(self._config.seed, stage_index),
            token_grid=token_grid(self._config.model),
            max_text_tokens=stage.max_text_tokens,
        )

    def page_scale(self) -> float | None:
        """Returns the scale of a sample of the pages of all stages."""
        return sample_scale(list(self._sources.values()), self._config.data.tiling)

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer and its chat template."""
        self._chat.save(folder)
