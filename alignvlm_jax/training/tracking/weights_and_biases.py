"""Weights & Biases, by its library `wandb` (the extra `wandb`).

The variables of wandb choose the rest: WANDB_PROJECT (default: alignvlm), WANDB_ENTITY, WANDB_MODE=offline,
WANDB_API_KEY and so on. Its files are in WORKDIR/wandb, or in a temporary folder if WORKDIR is in a bucket.
"""

import os
import tempfile
from collections.abc import Mapping

from alignvlm_jax.locations import is_local
from alignvlm_jax.training.tracking.tracker import RunInfo, ShownAnswer, Tracker

_SECONDS = 60
"""Longest wait for the network, at the start and at the end of a run, and for a login."""


class WeightsAndBiases(Tracker):
    """Logs to a run of W&B."""

    def __init__(self, run: RunInfo):
        import wandb

        self._wandb = wandb
        folder = str(run.workdir) if is_local(run.workdir) else tempfile.mkdtemp(prefix="alignvlm-wandb-")
        os.makedirs(folder, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "alignvlm",
            id=run.id,
            resume="allow",
            name=run.workdir.name,
            dir=folder,
            config={**run.config, "git_commit": run.commit},
            allow_val_change=True,
            # wandb would replace stdout and stderr.
            settings=wandb.Settings(
                console="off", init_timeout=_SECONDS, finish_timeout=_SECONDS, login_timeout=_SECONDS
            ),
        )
        # wandb drops points whose step is smaller than the last one. With a step of their own, the points of a run that
        # went back continue its curves.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        self._run.log({**values, "step": step})

    def log_answers(self, step: int, answers: Mapping[str, ShownAnswer]) -> None:
        """Adds the pages as images with the answers as captions."""
        self._run.log({"step": step, **{name: self._shown(answer) for name, answer in answers.items()}})

    def close(self, exit_code: int) -> None:
        """Uploads everything that is still queued."""
        self._run.finish(exit_code=exit_code)

    def _shown(self, answer: ShownAnswer):
        return answer.caption if answer.page is None else self._wandb.Image(answer.page, caption=answer.caption)
