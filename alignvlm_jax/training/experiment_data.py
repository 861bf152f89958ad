"""Provides the data of an experiment to the training loop: the plan and the packed batches of each stage."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data import groups, pipeline, store
from alignvlm_jax.data.conversations import Record
from alignvlm_jax.data.examples import ExampleReader
from alignvlm_jax.data.feeding import BatchIterator, Feed, RowStates
from alignvlm_jax.data.groups import SameImages
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
        self._same_images = None if config.data.group_questions == "off" else self._find_same_images()

    def _find_same_images(self) -> dict[str, SameImages]:
        """Returns which records of each data set show the same images. All processes must call it."""
        found = {}
        for name, records in self._sources.items():
            same = groups.cached(records.folder, records.identity)
            # Where one process lacks the stored result, all compute it together, each from a share of the records.
            if not all(distributed.gather_json(same is not None)):
                same = self._scan(name, records)
                if distributed.is_primary():
                    groups.store_cache(records.folder, records.identity, same)
            found[name] = same
        digests = {name: hashlib.sha256(same.first.tobytes()).hexdigest() for name, same in found.items()}
        distributed.require_equal({"the groups of records that show the same images": digests})
        return found

    def _scan(self, name: str, records: Sequence[Record]) -> SameImages:
        """Reads this process's share of the records and exchanges the digests with the other processes."""
        index, number = jax.process_index(), jax.process_count()
        share = range(len(records) * index // number, len(records) * (index + 1) // number)
        threads = max(self._config.data.read_threads, self._config.data.workers)
        scan = groups.scan(records, share, name=name, threads=threads, progress=distributed.is_primary())
        encoded = [base64.b64encode(field.tobytes()).decode() for field in scan]
        # The processes' shares are in the order of the records.
        digests, questions = zip(*distributed.gather_json(encoded), strict=True)
        return groups.match(
            groups.Scan(
                np.frombuffer(b"".join(map(base64.b64decode, digests)), np.uint32).reshape(-1, 2),
                np.frombuffer(b"".join(map(base64.b64decode, questions)), np.int32),
            )
        )

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
            same_images=self._same_images,
        )

    def page_scale(self) -> float | None:
        """Returns the scale of a sample of the pages of all stages."""
        return sample_scale(list(self._sources.values()), self._config.data.tiling)

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer and its chat template."""
        self._chat.save(folder)
