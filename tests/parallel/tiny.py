"""Trains a tiny experiment, the same in every process, and records its losses and the examples it used."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.models.connectors import MLPConfig
from alignvlm_jax.parallel.mesh import MeshConfig
from alignvlm_jax.training import loop, metrics
from alignvlm_jax.training.experiment_data import ExperimentData
from tests.training import batches

MODEL = dataclasses.replace(
    batches.MODEL,
    vision=dataclasses.replace(batches.MODEL.vision, num_layers=1),
    connector=MLPConfig(),
    language=dataclasses.replace(batches.MODEL.language, num_layers=1),
)
"""As small as possible, because every process compiles it."""
ROWS = 8  # bins per microbatch; data x fsdp of every mesh in the tests divides it
STEPS = 5


def config(mesh, seed=0, model=MODEL) -> ExperimentConfig:
    """Returns the experiment on a mesh of (data, fsdp, tensor) devices. It saves once, after its last step."""
    return ExperimentConfig(
        seed=seed,
        model=model,
        data=DataConfig(tiling=TilingConfig(tile_size=16), packing=PackingConfig(64, 3, ROWS)),
        mesh=MeshConfig(*mesh),
        stages=(batches.stage(steps=STEPS, warmup_steps=1),),
        checkpoint=CheckpointConfig(every_steps=STEPS, keep=10),
        log_every_steps=1,
    )


def make_params(experiment):
    params = _random_params(experiment.model, experiment.seed)
    return jax.tree.map(lambda leaf: leaf, params)  # copies the dicts, which a test may change


@functools.cache
def _random_params(model, seed):
    make = jax.jit(lambda: random_parameters(model, jax.random.key(seed)))
    return jax.device_get(nn.unbox(make()))


def train(
    workdir,
    experiment,
    *,
    losses: dict,
    examples: list,
    documents=False,
    bad_batches=(),
    bad_stage=0,
    skip=(),
    make_params=make_params,
    **options,
):
    """Trains the experiment, on random bins unless `documents`.

    Args:
      workdir: folder of the run.
      experiment: the config.
      losses: filled with {step: (loss, number of refused examples)}.
      examples: filled with the examples that this process makes: [step, row] of random bins, or numbers of documents.
      documents: whether to read the data sets of the config. Random bins report one refused example per row.
      bad_batches: numbers of the random batches, counted from 1, whose loss is not finite.
      bad_stage: index of the stage that has these batches.
      skip: numbers of the random batches that are skipped, as if they had been removed from the data.
      make_params: makes the initial weights.
      **options: other arguments of `loop.train`.

    Returns:
      The result of `loop.train`.
    """

    class RecordingLog(metrics.MetricsLog):
        """Copies the logged losses to `losses`."""

        def write(self, step, stage):
            summary = super().write(step, stage)
            losses[step] = summary["loss"], summary["refused"]
            return summary

    class RandomBatches:
        """Batches that depend only on the step, so that a resumed run gets the same ones."""

        def __init__(self, stage_index, step, rows):
            self.step, self.rows, self.bad_batches = step, list(rows), bad_batches if stage_index == bad_stage else ()

        def __next__(self):
            while self.step + 1 in skip:
                self.step += 1
            batch = batches.random_batch(self.step)
            if self.step + 1 in self.bad_batches:
                batch["loss_weights"][...] = np.inf
            batch["num_refused"] = np.ones((1, ROWS), np.int32)
            batch["example_ids"] = np.arange(ROWS, dtype=np.int32).reshape(1, ROWS, 1) + ROWS * self.step
            examples.extend([self.step, row] for row in self.rows)
            self.step += 1
            return {name: field[:, self.rows] for name, field in batch.items()}

        def state(self):
            return {str(row): self.step for row in self.rows}

        def refused(self):
            return []

        def name(self, number):
            return f"page-{number}"

        def close(self):
            pass

    class RecordingFeed:
        """Wraps the real feed and copies the numbers of its documents to `examples`."""

        def __init__(self, feed):
            self.feed = feed

        def __next__(self):
            batch = next(self.feed)
            examples.extend(batch["example_ids"][batch["example_ids"] >= 0].tolist())
            return batch

        def __getattr__(self, name):
            return getattr(self.feed, name)

    class DocumentData(ExperimentData):
        def batches(self, *arguments):
            return RecordingFeed(super().batches(*arguments))

    class RandomData:
        """Stands in for the data sets of the config."""

        def __init__(self, _):
            pass

        def plan(self, stage_index, stage):
            return StagePlan(stage.steps, 1, 1.0)

        def batches(self, stage_index, stage, plan, state, rows):
            return RandomBatches(stage_index, state[str(rows[0])] if state else 0, rows)

        def page_scale(self):
            return None

        def save_tokenizer(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "tokenizer.json").write_text("{}")

    original, metrics.MetricsLog = metrics.MetricsLog, RecordingLog
    try:
        return loop.train(
            experiment,
            workdir,
            open_data=DocumentData if documents else RandomData,
            make_params=make_params,
            **options,
        )
    finally:
        metrics.MetricsLog = original
