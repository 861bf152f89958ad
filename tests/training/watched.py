"""Trains, and records the content of each batch."""

import hashlib

import flax.linen as nn
import jax

from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.training import loop
from alignvlm_jax.training.experiment_data import ExperimentData


class Watched(ExperimentData):
    """Records the rows of each batch that this process makes, as {row: hash}."""

    seen: list[dict[str, str]] = []

    def batches(self, stage_index, stage, plan, state, rows):
        iterator = super().batches(stage_index, stage, plan, state, rows)

        class Noting(type(iterator)):
            def __next__(self):
                batch = super().__next__()
                Watched.seen.append({str(row): _hash(batch, place) for place, row in enumerate(rows)})
                return batch

        iterator.__class__ = Noting
        return iterator


def _hash(batch, place):
    return hashlib.sha256(b"".join(batch[name][:, place].tobytes() for name in sorted(batch))).hexdigest()


def train(config, workdir, **options):
    """Returns the result (None if the run was interrupted) and the record of every batch that was trained on."""
    Watched.seen = []

    def make_params(config):
        return jax.device_get(nn.unbox(jax.jit(lambda: random_parameters(config.model, jax.random.key(0)))()))

    try:
        result = loop.train(config, workdir, open_data=Watched, make_params=make_params, **options)
    except KeyboardInterrupt:
        result = None
    return result, Watched.seen
