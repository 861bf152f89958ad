"""Runs one job: trains to the end or to the time limit, resumes, scores, and writes the result.

Axes: Q questions.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

import alignvlm_jax
from alignvlm_jax.checkpoints import provenance
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic import HELD_OUT_FONT
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.metrics import anls
from alignvlm_jax.evaluation.report import Report
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import PARTS, Params, tokens_per_tile
from alignvlm_jax.reproduce import recipe
from alignvlm_jax.reproduce.jobs import COMPLETE, OVER_TIME, RESULT_FILE, Job, Result
from alignvlm_jax.reproduce.options import Options, write_json
from alignvlm_jax.reproduce.validation import OnePagePerBin, ValidationLoss
from alignvlm_jax.training import loop

CURVE_FILE = "curve.json"
_CURVE_POINTS = 5


class OverTimeError(Exception):
    """Raised when a run exceeds its time limit. It can be resumed under a higher one."""


class Work:
    """One job in progress.

    Attributes:
      options: options of the command.
      out: output folder of the command.
      job: the job.
      folder: folder of the job.
      share: number of jobs that share the machine. The time limit is for a job that has the machine to itself.
      training: data about the training, which become entries of the result.
    """

    def __init__(self, options: Options, out: Path, job: Job, share: int = 1):
        self.options, self.out, self.job, self.share = options, out, job, share
        self.folder = job.folder(out)
        self.training: dict[str, Any] = {}

    @property
    def data(self) -> Path:
        """Folder of the data sets."""
        return self.out / "data"

    def experiment(self, **changes: Any) -> ExperimentConfig:
        """Returns the config of this job; `changes` are arguments of `recipe.experiment`."""
        job = self.job
        arguments = dict(connector=job.connector, encoder=job.encoder, seed=job.seed) | changes
        return recipe.experiment(self.options, self.data, **arguments)

    def on_pages(self, config: ExperimentConfig, fraction: float) -> ExperimentConfig:
        """Returns the config restricted to a fraction of the run's pages.

        A fraction of 1 is the number of pages that the recipe's steps consume if each page is seen once. The number of
        steps stays the same, so with fewer pages, each page is seen more often.
        """
        seen = recipe.pages_seen(self.experiment().stages)
        pages = min(max(1, round(fraction * seen)), len(self.records("train")))
        return recipe.on_split(config, f"train[:{pages}]")

    def records(self, split: str, dataset: str = "documents") -> store.RecordSource:
        """Returns the records of a split."""
        return store.open_dataset(self.data / dataset, split)

    def train(self, config: ExperimentConfig) -> Params:
        """Trains or resumes, and records data about the training in `training`.

        Raises:
          OverTimeError: if the job exceeds its minutes.
          distributed.Interrupted: on a signal, after the run is saved.
        """
        workdir = self.job.workdir(self.out)
        last_step = sum(stage.steps for stage in config.stages)
        # Score a few times during training, for the learning curve.
        evaluation = dataclasses.replace(config.evaluation, every_steps=max(1, last_step // _CURVE_POINTS))
        config = dataclasses.replace(config, evaluation=evaluation)
        # With `share` jobs at the same time, each gets `share` times the limit.
        clock = _Clock(workdir, config, 60 * self.options.minutes * self.share)
        loss = ValidationLoss(config)
        curve = _Curve(self.folder / CURVE_FILE)

        def score(params: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
            with clock.paused():
                value = loss(params)
                curve.add(clock.step, value)
            return {"loss": value}

        self.training |= {
            "config": config_to_dict(config),
            "visual_tokens_per_page": config.data.packing.tiles_per_bin * tokens_per_tile(config.model),
            "pages": recipe.pages_seen(config.stages),
        }
        try:
            params = loop.train(
                config,
                workdir,
                open_data=OnePagePerBin,
                on_stage_start=clock.start_stage,
                on_step=clock.tick,
                score=score,
            ).params
        finally:
            # Also recorded for a run that is stopped, because its result is written too.
            self.training |= {
                "steps": clock.step,
                "steps_asked": last_step,
                "train_seconds": round(clock.seconds, 1),
                "seconds_per_step": clock.seconds_per_step(),
                "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "curve": curve.points,
            }
        # The last step gets a point even if the number of steps is not a multiple of the interval between points.
        if not curve.points or curve.points[-1][0] != last_step:
            curve.add(last_step, loss(params))
        self.training["parameters"] = {
            part: int(sum(leaf.size for leaf in jax.tree.leaves(params[part]))) for part in PARTS
        }
        self.training["validation_loss"] = curve.points[-1][1]
        return params

    def reader(self, job: Job | None = None) -> Reader:
        """Returns the trained model of this job, or of another job."""
        return alignvlm_jax.load((job or self.job).workdir(self.out))

    def score(self, reader: Reader, records: Sequence[Any], limit: int | None, **arguments: Any) -> dict[str, Any]:
        """Asks the questions and returns `scores` of the answers."""
        return scores(runner.evaluate(reader, records, limit=limit, unseen_fonts=(HELD_OUT_FONT,), **arguments))

    def finish(self, found: dict[str, Any], status: str) -> None:
        """Writes the job's result.

        Keys of the file:
          job: the name of the job.
          status: "complete", or "over time" if it reached the time limit of `minutes`.
          found: the measurements of the part.
          config, steps, parameters, curve, ...: data about the training, if the job trains.
        """
        result: Result = {
            "job": self.job.name,
            "status": status,
            "minutes": self.options.minutes,
            **{name: value for name, value in self.training.items() if name != "config"},
            "found": found,
            "versions": provenance.versions(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "jobs_at_once": self.share,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": self.training.get("config"),
        }
        write_json(result, self.folder / RESULT_FILE)


def run_job(work: Work, run: Callable[[Work], dict[str, Any]]) -> None:
    """Runs a job with the `run` of its part and writes the result, even if it runs out of time."""
    try:
        found = run(work)
    except OverTimeError:
        work.finish({}, OVER_TIME)
    else:
        work.finish(found, COMPLETE)


def scores(report: Report) -> dict[str, Any]:
    """Returns an evaluation in a form small enough to commit, with enough detail for intervals over pages.

    Some of the keys:
      right: one digit per question, 1 if the answer matches exactly.
      anls: mean similarity of the answers, the score of DocVQA.
      questions: number of questions on each page, in the same order.
    """
    answers = report.answers
    similarity = [anls(answer.predicted, [answer.expected]) for answer in answers]
    # The questions of a page are consecutive, so a new document id starts a new page.
    pages = [answers[0].document]
    counts = [0]
    for answer in answers:
        if answer.document != pages[-1]:
            pages.append(answer.document)
            counts.append(0)
        counts[-1] += 1
    return {
        "exact_match": round(report.overall.exact_match, 4),
        "anls": round(float(np.mean(similarity)), 4),
        "families": {family: round(tally.exact_match, 4) for family, tally in report.per_family.items()},
        "unseen_font": round(report.unseen_font.exact_match, 4) if report.unseen_font.total else None,
        "seconds": round(report.seconds, 1),
        "right": "".join("01"[answer.is_right] for answer in answers),
        "questions": counts,
    }


def digits(score: dict[str, Any]) -> Int[np.ndarray, " Q"]:
    """Returns the digits of a result of `scores`: 1 for each question answered right, 0 for the others."""
    return np.array([int(digit) for digit in score["right"]])


class _Clock:
    """Measures the seconds of training over all invocations of a run, without scoring, and ends it at the limit."""

    def __init__(self, workdir: Path, config: ExperimentConfig, limit: float):
        # A resumed run continues with the seconds of its checkpoint.
        with Checkpointer(workdir, config) as checkpointer:
            progress = checkpointer.latest()
        self.step = progress.step if progress else 0
        self._previous_seconds = progress.train_seconds if progress else 0.0
        self._limit = limit
        self._start_time = self._last_time = None
        self._stage = 0
        self._names = [stage.name for stage in config.stages]
        self._seconds: dict[str, list[float]] = {}

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._previous_seconds + (time.monotonic() - self._start_time if self._start_time else 0.0)

    def start_stage(self, index: int, params: Params) -> None:
        """Starts the clock, or a new stage."""
        self._stage, self._last_time = index, None  # The first step compiles and is not timed.
        self._start_time = self._start_time or time.monotonic()

    def tick(self, step: int) -> None:
        """Records the end of a step.

        Raises:
          OverTimeError: if the limit is exceeded.
        """
        now, self.step = time.monotonic(), step
        if self._last_time is not None:
            self._seconds.setdefault(self._names[self._stage], []).append(now - self._last_time)
        self._last_time = now
        if self.seconds > self._limit:
            raise OverTimeError

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of this context, and times no step across it."""
        pause_start = time.monotonic()
        yield
        # Moving the start forward removes the pause from all later readings.
        self._start_time += time.monotonic() - pause_start
        self._last_time = None

    def seconds_per_step(self) -> dict[str, float]:
        """Returns the median seconds of a step, by stage."""
        return {stage: round(statistics.median(seconds), 4) for stage, seconds in self._seconds.items()}


class _Curve:
    """Validation loss by step, stored in a file because a run may take several invocations."""

    def __init__(self, file: Path):
        self._file = file
        self.points: list[list[float]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    def add(self, step: int, loss: float) -> None:
        """Adds a point, and drops points of this and later steps."""
        # A run that resumes from an older checkpoint measures such points again.
        self.points = [point for point in self.points if point[0] < step] + [[step, round(loss, 5)]]
        write_json(self.points, self._file)
