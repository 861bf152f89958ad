"""Decides which checkpoints of a run are kept."""

import math
from collections.abc import Mapping

from alignvlm_jax.config.run import CheckpointConfig


def kept_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """Returns the steps to keep, given the logged metrics of every existing step."""
    steps = sorted(metrics)
    kept = set(steps[-config.keep :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    # The best steps by the configured metric. Steps without the metric, or with NaN, do not compete.
    sign = 1 if config.best == "min" else -1
    ranked = {step: sign * metrics[step].get(config.best_metric, math.nan) for step in steps}
    comparable = sorted((step for step in steps if not math.isnan(ranked[step])), key=ranked.__getitem__)
    return kept | set(comparable[: config.keep_best])
