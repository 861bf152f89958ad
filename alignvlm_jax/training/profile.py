"""Traces some steps for TensorBoard's profile plugin, which shows the time of each operation on the host and the chips.

    alignvlm train --config FILE --workdir DIR --config.profile.steps=10:13
    pip install tensorboard xprof; tensorboard --logdir DIR     # tab "Profile"

Tracing slows down the traced steps, so read speeds from other steps.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from alignvlm_jax.config.run import ProfileConfig, traced_steps
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_bucket
from alignvlm_jax.parallel import distributed
from alignvlm_jax.storage.transfer import upload


class Profiler:
    """Traces the configured steps into `folder`/plugins/profile/.

    It is a context manager, whose exit ends a trace that has not reached its last step. With several processes, only
    the primary process traces, and only its own devices.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._steps = traced_steps(config) if distributed.is_primary() else range(0)
        self._folder, self._is_tracing = folder, False
        self._scratch: tempfile.TemporaryDirectory | None = None  # of a trace whose folder is in a bucket

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_tracing:
            self._stop()

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Returns a context manager for running step `number`, and starts the trace if this is its first step."""
        if number in self._steps and not self._is_tracing:
            if is_bucket(self._folder):
                self._scratch = tempfile.TemporaryDirectory(prefix="alignvlm_")
            jax.profiler.start_trace(self._scratch.name if self._scratch else str(self._folder))
            self._is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, outputs: Any) -> None:
        """Ends the trace if step `number`, which computes `outputs`, was its last."""
        if self._is_tracing and number + 1 not in self._steps:
            # The step has only been dispatched. Without waiting, the trace would miss most of it.
            jax.block_until_ready(outputs)
            self._stop()
            tqdm.write(f"traced up to step {number}: tensorboard --logdir {self._folder}, tab Profile")

    def _stop(self) -> None:
        self._is_tracing = False
        jax.profiler.stop_trace()
        if self._scratch is None:
            return
        with self._scratch as scratch:
            files = [file for file in Path(scratch).rglob("*") if file.is_file()]
            try:
                for file in files:
                    upload(file, self._folder / file.relative_to(scratch).as_posix())
            except UserError as error:  # a trace is not worth the run
                distributed.log(f"warning: the trace was not uploaded: {error}", file=sys.stderr)
        self._scratch = None
