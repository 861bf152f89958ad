"""Traces some steps for TensorBoard's profile plugin, which shows the time of each operation on host and chips.

    alignvlm train --config FILE --workdir DIR --config.profile.steps=10:13
    pip install tensorboard xprof; tensorboard --logdir DIR     # tab "Profile"

Tracing slows down the traced steps, so speeds are best read from other steps.
"""

from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from alignvlm_jax.config.run import ProfileConfig, traced_steps
from alignvlm_jax.parallel import distributed


class Profiler:
    """Traces the configured steps into `folder`/plugins/profile/.

    Leaving it as a context manager ends a trace whose last step was not reached. With several processes, only the
    primary process traces, and only its own devices.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._steps = traced_steps(config) if distributed.is_primary() else range(0)
        self._folder, self._is_tracing = folder, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Returns a context manager to run step `number` in."""
        if number in self._steps and not self._is_tracing:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, outputs: Any) -> None:
        """Ends the trace if step `number`, which computes `outputs`, was its last."""
        if self._is_tracing and number + 1 not in self._steps:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._is_tracing = False
            tqdm.write(f"traced up to step {number}: tensorboard --logdir {self._folder}, tab Profile")
