"""The main table: every connector under the recipe, on held-out questions and on controls that reveal guessing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import tuning
from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict
from alignvlm_jax.reproduce.work import Work, digits

_CONTROLS = ("blank", "wrong")


def job(connector: str, encoder: str, seed: int) -> Job:
    """Returns the run that other parts build upon."""
    needs = tuple(trial.name for trial in tuning.trials(connector, encoder))
    return Job("accuracy", encoder, connector, seed, needs=needs, wave=seed, weight=1.3)


def jobs(options: Options) -> list[Job]:
    """Returns the runs of all connectors and encoders, seed by seed."""
    return [
        job(connector, encoder, seed)
        for seed in range(options.seeds)
        for encoder in options.encoders
        for connector in recipe.connectors(options)
    ]


def run(work: Work) -> dict[str, Any]:
    """Trains with the tuned learning rate and scores the held-out questions and the controls."""
    factor = tuning.chosen_factor(work.out, work.job.connector, work.job.encoder)
    work.train(work.on_pages(work.experiment(factor=factor), 1.0))
    reader, heldout = work.reader(), work.records("heldout")
    found = {"factor": factor, "heldout": work.score(reader, heldout, work.options.questions)}
    for control in _CONTROLS:
        found[control] = work.score(reader, heldout, work.options.analysed, control=control)
    return found


def right_answers(
    results: Results, connector: str, encoder: str
) -> tuple[Int[np.ndarray, "seeds questions"], list[int]] | None:
    """Returns 1 (right) or 0 by seed and question, and the number of questions per page, or None without results."""
    runs = results.by_seed(lambda seed: job(connector, encoder, seed))
    scores = [result["found"]["heldout"] for result in runs.values()]
    if not scores:
        return None
    return np.array([digits(score) for score in scores]), scores[0]["questions"]


def difference(results: Results, first: str, second: str, encoder: str) -> Estimate | None:
    """Returns the lead of the first connector over the second, paired over the seeds that both have."""
    # The same seed means the same order of pages for both connectors, so their difference has less variance.
    pairs = []
    for seed in range(results.options.seeds):
        pair = results.complete([job(connector, encoder, seed) for connector in (first, second)])
        if len(pair) == 2:
            pairs.append([result["found"]["heldout"] for result in pair.values()])
    if not pairs:
        return None
    right = np.array([[digits(score) for score in pair] for pair in pairs])
    return estimate(right[:, 0] - right[:, 1], pairs[0][0]["questions"])


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report and writes its plots."""
    options = results.options
    # A table for each encoder.
    lines, bars = [], {}
    for encoder in options.encoders:
        table = [_row(results, connector, encoder) for connector in options.connectors]
        table = [row for row in table if row is not None]
        lines += [f"### {ENCODER_TITLES[encoder].capitalize()}", "", _HEADER, _RULE, *(row for row, _ in table), ""]
        bars[ENCODER_TITLES[encoder]] = {name: value for _, (name, value) in table}
    # Plots of the scores, and of the validation loss during training.
    if any(bars.values()):
        plots.bars(folder / "accuracy.svg", bars, "held-out questions answered exactly right")
        lines += ["![Share of held-out questions answered right, by connector and encoder](accuracy.svg)", ""]
        curves = {encoder: _curves(results, encoder) for encoder in options.encoders}
        titled = {ENCODER_TITLES[encoder]: by_name for encoder, by_name in curves.items() if by_name}
        plots.curves(
            folder / "learning.svg",
            titled,
            "steps",
            "validation loss, nats per answer token",
            logarithmic=(False, True),
        )
        lines += ["![Validation loss during training, mean of the seeds](learning.svg)", ""]
    return "\n".join([_INTRODUCTION.format(seeds=options.seeds), "", *lines, results.missing(jobs(options))])


_INTRODUCTION = (
    "Exact match of free greedy decoding on held-out pages, whose values training never saw.\n\n"
    "- Intervals are 95 % and cover both other seeds and other pages ({seeds} seeds at most; Student's t for each, "
    "added in quadrature).\n"
    "- *ANLS* is DocVQA's score of the same answers.\n"
    "- *Blank page* and *another page* ask the same questions with the image replaced by a white page or by another "
    "page of the same family. They measure what can be guessed without reading."
)
_HEADER = "| connector | exact match | seeds | ANLS | unseen font | blank page | another page | validation loss |"
_RULE = "|---|---|---|---:|---:|---:|---:|---:|"


def _row(results: Results, connector: str, encoder: str) -> tuple[str, tuple[str, Estimate]] | None:
    """Returns a row of the table with the name and estimate for the plot, or None without results."""
    answers = right_answers(results, connector, encoder)
    if answers is None:
        return None
    value = estimate(*answers)
    runs = list(results.by_seed(lambda seed: job(connector, encoder, seed)).values())
    seeds = ", ".join(f"{run['found']['heldout']['exact_match']:.3f}" for run in runs)
    means = [
        _mean([run["found"]["heldout"]["anls"] for run in runs]),
        _mean([run["found"]["heldout"]["unseen_font"] for run in runs]),
        *(_mean([run["found"][control]["exact_match"] for run in runs]) for control in _CONTROLS),
        _mean([run["validation_loss"] for run in runs]),
    ]
    return f"| {TITLES[connector]} | {value} | {seeds} | {' | '.join(means)} |", (TITLES[connector], value)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else ""


def _curves(results: Results, encoder: str) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the steps and the mean validation loss of each connector."""
    curves = {}
    for connector in results.options.connectors:
        runs = results.by_seed(lambda seed, connector=connector: job(connector, encoder, seed))
        points = [result["curve"] for result in runs.values()]
        if points:
            steps = [point[0] for point in points[0]]
            curves[TITLES[connector]] = steps, np.mean([[point[1] for point in curve] for curve in points], 0).tolist()
    return curves


def claims(results: Results) -> list[str]:
    """Returns the claims that ALIGN answers more questions than each of the other connectors."""
    lines = []
    for encoder in results.options.encoders:
        for other in results.options.connectors:
            lead = None if other == "align" else difference(results, "align", other, encoder)
            if lead is not None:
                lines.append(
                    f"{verdict(lead)}: ALIGN answers more questions than {TITLES[other]} ({ENCODER_TITLES[encoder]}): "
                    f"{lead.signed()}."
                )
    return lines


PART = Part("accuracy", "Accuracy under one recipe", jobs, run, section, claims)
