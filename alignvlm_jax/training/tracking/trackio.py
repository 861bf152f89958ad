"""trackio, by its library of this name (the extra `trackio`).

The variables of trackio choose the rest: TRACKIO_PROJECT (default: alignvlm), TRACKIO_DIR for the local database, and
TRACKIO_SPACE_ID for a Space on the Hugging Face Hub. `trackio show` opens the curves.
"""

import contextlib
import io
import os
from collections.abc import Mapping

from alignvlm_jax.training.tracking.tracker import RunInfo, ShownAnswer, Tracker


class Trackio(Tracker):
    """Logs to a run of trackio."""

    def __init__(self, run: RunInfo):
        import trackio

        self._trackio = trackio
        with _quiet():
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT") or "alignvlm",
                # trackio finds the run to resume by its name.
                name=f"{run.workdir.name}-{run.id}",
                resume="allow" if run.is_resumed else "never",
                config={**run.config, "git_commit": run.commit},
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        self._run.log(dict(values), step=step)

    def log_answers(self, step: int, answers: Mapping[str, ShownAnswer]) -> None:
        """Adds the pages as images with the answers as captions."""
        self._run.log({name: self._shown(answer) for name, answer in answers.items()}, step=step)

    def close(self, exit_code: int) -> None:
        """Stores everything that is still queued."""
        with _quiet():
            self._trackio.finish()

    def _shown(self, answer: ShownAnswer):
        if answer.page is None:
            return self._trackio.Markdown(answer.caption)
        return self._trackio.Image(answer.page, caption=answer.caption)


def _quiet() -> contextlib.AbstractContextManager:
    """Returns a context without trackio's lines on stdout."""
    return contextlib.redirect_stdout(io.StringIO())
