"""The loss on validation questions: what the connectors' learning rates are chosen by.

Exact match is 0 until a run reads, and tells a run that nearly does from one that never will as little as a coin; the
loss of the right answers does tell, from the first step on.
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


class OnePageABin(ExperimentData):
    """The data of a recipe whose bins hold one page each: there is nothing to be measured before it is planned."""

    def plan(self, stage_index: int, stage: StageConfig) -> StagePlan:
        microbatches = stage.bins_per_step // self._config.data.packing.bins_per_microbatch
        return StagePlan(stage.steps, microbatches, examples_per_bin=1.0)


class ValidationLoss:
    """Mean loss of the answers' tokens over the first `PAGES` pages of the validation split, all of their questions.

    The same pages and questions, in the same order, for every connector and seed.
    """

    def __init__(self, config: ExperimentConfig, dataset: str | None = None):
        last = config.stages[-1]
        part = MixturePart(dataset or last.mixture[0].dataset, "validation", "qa")
        stage = dataclasses.replace(last, mixture=(part,), steps=max(1, PAGES // last.bins_per_step))
        config = dataclasses.replace(config, stages=(stage,), seed=0, init_from=None)
        data = OnePageABin(config)
        rows = range(config.data.packing.bins_per_microbatch)
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
        total = weight = 0.0
        for batch in self._batches:
            for microbatch in range(len(batch["tokens"])):
                rows = {name: field[microbatch] for name, field in batch.items()}
                output = self._loss(params, rows)
                total, weight = total + float(output.loss), weight + float(output.weight)
        return float(np.divide(total, weight))
