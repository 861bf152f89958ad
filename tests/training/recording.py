"""Trains and records the content of each batch."""

import hashlib

import flax.linen as nn
import jax

from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.training import loop
from alignvlm_jax.training.experiment_data import ExperimentData


class RecordingData(ExperimentData):
    """Appends {row: hash} to `recorded` for each batch that this process makes."""

    recorded: list[dict[str, str]] = []

    def batches(self, stage_index, stage, plan, state, rows):
        iterator = super().batches(stage_index, stage, plan, state, rows)

        class RecordingIterator(type(iterator)):
            def __next__(self):
                batch = super().__next__()
                RecordingData.recorded.append({str(row): _hash(batch, index) for index, row in enumerate(rows)})
                return batch

        # The loop uses more than `__next__`, so the iterator keeps its own type and state.
        iterator.__class__ = RecordingIterator
        return iterator


def _hash(batch, row):
    """Returns a digest of all fields of one row, over all microbatches."""
    return hashlib.sha256(b"".join(batch[name][:, row].tobytes() for name in sorted(batch))).hexdigest()


def train(config, workdir, **options):
    """Returns the result, or None if the run was interrupted, and {row: hash} for every batch that was trained on."""
    RecordingData.recorded = []

    def make_params(config):
        return jax.device_get(nn.unbox(jax.jit(lambda: random_parameters(config.model, jax.random.key(0)))()))

    try:
        result = loop.train(config, workdir, open_data=RecordingData, make_params=make_params, **options)
    except KeyboardInterrupt:
        result = None
    return result, RecordingData.recorded
