"""Doing one job: train to the end or to the cap, resume, score, and leave the result.

Axes: S stages, Q questions.
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
from alignvlm_jax.reproduce.validation import OnePageABin, ValidationLoss
from alignvlm_jax.training import loop

CURVE_FILE = "curve.json"
_POINTS = 5  # of a learning curve


class OverTimeError(Exception):
    """The run took longer than it may; it can go on under a higher cap."""


class Work:
    """One job being done.

    Attributes:
      options: of the whole.
      out: the output folder of the whole.
      job: which job.
      folder: the job's own.
      share: jobs that share the machine at the same time: the cap is of the machine's time.
      figures: what goes into the result besides what the part measures.
    """

    def __init__(self, options: Options, out: Path, job: Job, share: int = 1):
        self.options, self.out, self.job, self.share = options, out, job, share
        self.folder = job.folder(out)
        self.figures: dict[str, Any] = {}

    @property
    def data(self) -> Path:
        return self.out / "data"

    def experiment(self, **changes: Any) -> ExperimentConfig:
        """The recipe for this job; `changes` as of `recipe.experiment`."""
        job = self.job
        arguments = dict(connector=job.connector, encoder=job.encoder, seed=job.seed) | changes
        return recipe.experiment(self.options, self.data, **arguments)

    def on_pages(self, config: ExperimentConfig, fraction: float) -> ExperimentConfig:
        """The config with so much of the run's pages to train on: 1 is as many as the recipe's steps take, seen once.

        A share of them is seen more often, in as many steps.
        """
        seen = recipe.pages_seen(self.experiment().stages)
        pages = min(max(1, round(fraction * seen)), len(self.records("train")))
        return recipe.on_split(config, f"train[:{pages}]")

    def records(self, split: str, dataset: str = "documents") -> store.RecordSource:
        return store.open_dataset(self.data / dataset, split)

    def train(self, config: ExperimentConfig) -> Params:
        """Trains, or goes on; the figures of it go into the result.

        Raises:
          OverTimeError: after the job's minutes.
          distributed.Interrupted: a signal came; the run was saved.
        """
        workdir = self.job.workdir(self.out)
        every = max(1, sum(stage.steps for stage in config.stages) // _POINTS)
        evaluation = dataclasses.replace(config.evaluation, every_steps=every)
        config = dataclasses.replace(config, evaluation=evaluation)
        clock = _Clock(workdir, config, 60 * self.options.minutes * self.share)
        loss = ValidationLoss(config)
        curve = _Curve(self.folder / CURVE_FILE)
        last = sum(stage.steps for stage in config.stages)

        def score(params: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
            with clock.paused():
                curve.add(clock.step, found := loss(params))
            return {"loss": found}

        self.figures |= {
            "config": config_to_dict(config),
            "visual_tokens_per_page": config.data.packing.tiles_per_bin * tokens_per_tile(config.model),
            "pages": recipe.pages_seen(config.stages),
        }
        try:
            params = loop.train(
                config,
                workdir,
                open_data=OnePageABin,
                on_stage_start=clock.start_stage,
                on_step=clock.tick,
                score=score,
            ).params
        finally:
            self.figures |= {
                "steps": clock.step,
                "steps_asked": last,
                "train_seconds": round(clock.seconds, 1),
                "seconds_per_step": clock.seconds_per_step(),
                "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "curve": curve.points,
            }
        if not curve.points or curve.points[-1][0] != last:
            curve.add(last, loss(params))
        self.figures["parameters"] = {
            part: int(sum(leaf.size for leaf in jax.tree.leaves(params[part]))) for part in PARTS
        }
        self.figures["validation_loss"] = curve.points[-1][1]
        return params

    def reader(self, of: Job | None = None) -> Reader:
        """The trained model of this job, or of another."""
        return alignvlm_jax.load((of or self.job).workdir(self.out))

    def score(self, reader: Reader, records: Sequence[Any], limit: int | None, **arguments: Any) -> dict[str, Any]:
        """Asks the questions; see `scores`."""
        return scores(runner.evaluate(reader, records, limit=limit, unseen_fonts=(HELD_OUT_FONT,), **arguments))

    def finish(self, found: dict[str, Any], status: str) -> None:
        """Writes the job's result.

        job, status        which, and whether it is complete; "over time" ran into the cap of `minutes`
        found              what the part measured
        config, steps, seconds, parameters, curve, ...   of the training, if it trains
        """
        result: Result = {
            "job": self.job.name,
            "status": status,
            "minutes": self.options.minutes,
            **{name: value for name, value in self.figures.items() if name != "config"},
            "found": found,
            "versions": provenance.versions(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "jobs_at_once": self.share,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": self.figures.get("config"),
        }
        write_json(result, self.folder / RESULT_FILE)


def do(work: Work, run: Callable[[Work], dict[str, Any]]) -> None:
    """Does a job, as its part's `run` says, and writes the result, also if it ran out of time."""
    try:
        found = run(work)
    except OverTimeError:
        work.finish({}, OVER_TIME)
    else:
        work.finish(found, COMPLETE)


def scores(report: Report) -> dict[str, Any]:
    """An evaluation, small enough to be kept for good and whole enough for intervals over pages.

    right: a digit a question, 1 if the answer matches exactly.
    anls: the mean similarity of the answers, DocVQA's score.
    questions: how many there were on each page, in the same order.
    """
    answers = report.answers
    similarity = [anls(answer.predicted, [answer.expected]) for answer in answers]
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
    """Which questions were right, 0 or 1, of what `scores` made."""
    return np.array([int(digit) for digit in score["right"]])


class _Clock:
    """Seconds of training over all sittings, without those of scoring; ends the run at the cap."""

    def __init__(self, workdir: Path, config: ExperimentConfig, limit: float):
        with Checkpointer(workdir, config) as checkpointer:
            progress = checkpointer.latest()
        self.step = progress.step if progress else 0
        self._before = progress.train_seconds if progress else 0.0
        self._limit = limit
        self._started = self._last = None
        self._stage = 0
        self._names = [stage.name for stage in config.stages]
        self._seconds: dict[str, list[float]] = {}

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._started if self._started else 0.0)

    def start_stage(self, index: int, params: Params) -> None:
        self._stage, self._last = index, None  # the first step compiles
        self._started = self._started or time.monotonic()

    def tick(self, step: int) -> None:
        now, self.step = time.monotonic(), step
        if self._last is not None:
            self._seconds.setdefault(self._names[self._stage], []).append(now - self._last)
        self._last = now
        if self.seconds > self._limit:
            raise OverTimeError

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began
        self._last = None

    def seconds_per_step(self) -> dict[str, float]:
        """The median of each stage."""
        return {stage: round(statistics.median(seconds), 4) for stage, seconds in self._seconds.items()}


class _Curve:
    """Validation loss by step, kept in a file because a run may take several sittings."""

    def __init__(self, file: Path):
        self._file = file
        self.points: list[list[float]] = json.loads(file.read_text()) if file.is_file() else []

    def add(self, step: int, loss: float) -> None:
        """A point; what was measured beyond it, before the run went back to a checkpoint, is measured again."""
        self.points = [point for point in self.points if point[0] < step] + [[step, round(loss, 5)]]
        write_json(self.points, self._file)
