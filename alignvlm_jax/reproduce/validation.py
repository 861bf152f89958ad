"""Validation loss, by which the connectors' learning rates are chosen.

Exact match is 0 until a model can read, so it cannot distinguish a run that is close to reading from a run that will
never read. The loss of the right answers can, from the first step on.
"""

import dataclasses

import jax
import numpy as np

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import MixturePart, StageConfig
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.models.alignvlm import AlignVLM, Params
from alignvlm_jax.training.experiment_data import ExperimentData
from alignvlm_jax.training.train_step import FIELDS

PAGES = 64


class OnePagePerBin(ExperimentData):
    """Data of a recipe whose bins hold one page each, so that the plan of a stage needs no measurement of the data."""

    def plan(self, stage_index: int, stage: StageConfig) -> StagePlan:
        """Returns the plan of a stage: the configured steps, with one example per bin."""
        microbatches = stage.bins_per_step // self._config.data.packing.bins_per_microbatch
        return StagePlan(stage.steps, microbatches, examples_per_bin=1.0)


class ValidationLoss:
    """Mean loss of the answer tokens over the first `PAGES` pages of the validation split, with all their questions.

    The pages, the questions and their order are the same for every connector and seed.
    """

    def __init__(self, config: ExperimentConfig, dataset: str | None = None):
        last = config.stages[-1]
        part = MixturePart(dataset or last.mixture[0].dataset, "validation", "qa")
        stage = dataclasses.replace(last, mixture=(part,), steps=max(1, PAGES // last.bins_per_step))
        config = dataclasses.replace(config, stages=(stage,), seed=0, init_from=None)
        data = OnePagePerBin(config)
        rows = range(config.data.packing.bins_per_microbatch)
        # The batches are small enough to keep in memory, and every evaluation uses them again.
        batches = data.batches(0, stage, data.plan(0, stage), None, rows)
        try:
            self._batches = [
                {name: batch[name] for name in FIELDS} for batch, _ in zip(batches, range(stage.steps), strict=False)
            ]
        finally:
            batches.close()
        model = AlignVLM(config.model)
        self._loss = jax.jit(lambda params, rows: model.apply({"params": params}, rows, method="loss"))

    def __call__(self, params: Params) -> float:
        """Returns the loss in nats per answer token."""
        total = weight = 0.0
        for batch in self._batches:
            for microbatch in range(len(batch["tokens"])):
                rows = {name: field[microbatch] for name, field in batch.items()}
                output = self._loss(params, rows)
                total, weight = total + float(output.loss), weight + float(output.weight)
        return float(np.divide(total, weight))
