"""TensorBoard: event files in WORKDIR/tensorboard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from alignvlm_jax.training.tracking import bucket_events
from alignvlm_jax.training.tracking.tensorboardx import SummaryWriter
from alignvlm_jax.training.tracking.tracker import RunInfo, ShownAnswer, Tracker

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Writes event files."""

    def __init__(self, run: RunInfo):
        self._folder = run.workdir / FOLDER
        self._writer = open_writer(self._folder, run.first_step)
        facts = {"config": json.dumps(run.config, indent=2), "git_commit": run.commit}
        for name, text in facts.items():
            if text:
                # Four spaces make a block of code in Markdown.
                self._writer.add_text(name, "    " + text.replace("\n", "\n    "), run.first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        self._check()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_answers(self, step: int, answers: Mapping[str, ShownAnswer]) -> None:
        """Adds the pages as images, and the answers as text."""
        self._check()
        for name, answer in answers.items():
            if answer.page is not None:
                self._writer.add_image(name, answer.page, step, dataformats="HWC")
            self._writer.add_text(name, answer.caption, step)

    def rewind(self, step: int) -> None:
        """Drops the points after `step`."""
        self.close(0)
        self._writer = open_writer(self._folder, step)

    def close(self, exit_code: int) -> None:
        """Writes everything that is still queued, if the disk has space."""
        self._check()
        self._writer.close()

    def _check(self) -> None:
        # The writer's thread ends when the disk is full. More values would then fill its queue and block forever.
        if not self._writer.file_writer.event_writer._worker.is_alive():
            raise OSError(f"{self._folder} cannot be written")


def open_writer(folder: Path, first_step: int) -> SummaryWriter:
    """Opens a new event file. Readers drop the points of earlier files after `first_step`."""
    # Readers sort the files by their names, which hold the time in seconds. A run that goes back may do so at once.
    suffix = f".{time.time_ns()}"
    bucket_events.register()
    return SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=10, max_queue=1000, filename_suffix=suffix)
