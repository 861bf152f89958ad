"""The main table: every connector under the recipe, on held-out questions, and on the controls that catch guessing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import tuning
from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict
from alignvlm_jax.reproduce.work import Work, digits

_CONTROLS = ("blank", "wrong")


def job(connector: str, encoder: str, seed: int) -> Job:
    """The run that other parts build upon."""
    needs = tuple(trial.name for trial in tuning.trials(connector, encoder))
    return Job("accuracy", encoder, connector, seed, needs=needs, wave=seed, weight=1.3)


def jobs(options: Options) -> list[Job]:
    return [
        job(connector, encoder, seed)
        for seed in range(options.seeds)
        for encoder in options.encoders
        for connector in recipe.connectors(options)
    ]


def run(work: Work) -> dict[str, Any]:
    factor = tuning.chosen_factor(work.out, work.job.connector, work.job.encoder)
    work.train(work.on_pages(work.experiment(factor=factor), 1.0))
    reader, heldout = work.reader(), work.records("heldout")
    found = {"factor": factor, "heldout": work.score(reader, heldout, work.options.questions)}
    for control in _CONTROLS:
        found[control] = work.score(reader, heldout, work.options.analysed, control=control)
    return found


def rightness(results: Results, connector: str, encoder: str) -> tuple[np.ndarray, list[int]] | None:
    """Which questions each seed answered right, [seeds, questions] of 0 and 1, and the questions on each page."""
    all_seeds = [job(connector, encoder, seed) for seed in range(results.options.seeds)]
    found = [result["found"]["heldout"] for result in results.complete(all_seeds).values()]
    if not found:
        return None
    return np.array([digits(score) for score in found]), found[0]["questions"]


def difference(results: Results, first: str, second: str, encoder: str) -> Estimate | None:
    """By how much the first connector is better, over the seeds that both have: same seeds, same questions."""
    found = [
        results.complete([job(connector, encoder, seed) for connector in (first, second)])
        for seed in range(results.options.seeds)
    ]
    pairs = [[result["found"]["heldout"] for result in pair.values()] for pair in found if len(pair) == 2]
    if not pairs:
        return None
    right = np.array([[digits(score) for score in pair] for pair in pairs])
    return estimate(right[:, 0] - right[:, 1], pairs[0][0]["questions"])


def section(results: Results, folder: Path) -> str:
    options = results.options
    lines, bars = [], {}
    for encoder in options.encoders:
        table = [_row(results, connector, encoder) for connector in options.connectors]
        table = [row for row in table if row is not None]
        lines += [f"### {ENCODER_TITLES[encoder].capitalize()}", "", _HEADER, _RULE, *(row for row, _ in table), ""]
        bars[ENCODER_TITLES[encoder]] = {name: value for _, (name, value) in table}
    if any(bars.values()):
        plots.bars(folder / "accuracy.svg", bars, "held-out questions answered exactly right")
        lines += ["![Share of held-out questions answered right, by connector and encoder](accuracy.svg)", ""]
        curves = {encoder: _curves(results, encoder) for encoder in options.encoders}
        titled = {ENCODER_TITLES[encoder]: found for encoder, found in curves.items() if found}
        plots.curves(
            folder / "learning.svg",
            titled,
            "steps",
            "validation loss, nats per answer token",
            logarithmic=(False, True),
        )
        lines += ["![Validation loss while training, mean of the seeds](learning.svg)", ""]
    return "\n".join([_WHAT.format(seeds=options.seeds), "", *lines, results.missing(jobs(options))])


_WHAT = (
    "Exact match by free greedy decoding on held-out pages, whose values training never saw. Intervals are 95 % and "
    "count both what another seed and what other pages would change ({seeds} seeds at most; Student's t for each, "
    "added in squares). ANLS is DocVQA's score of the same answers. Blank page and another page of its family are the "
    "same questions with the picture exchanged: what can be had without reading."
)
_HEADER = "| connector | exact match | seeds | ANLS | unseen font | blank page | another page | validation loss |"
_RULE = "|---|---|---|---:|---:|---:|---:|---:|"


def _row(results: Results, connector: str, encoder: str) -> tuple[str, tuple[str, Estimate]] | None:
    found = rightness(results, connector, encoder)
    if found is None:
        return None
    value = estimate(*found)
    runs = list(results.complete([job(connector, encoder, seed) for seed in range(results.options.seeds)]).values())
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
    curves = {}
    for connector in results.options.connectors:
        all_seeds = [job(connector, encoder, seed) for seed in range(results.options.seeds)]
        found = [result["curve"] for result in results.complete(all_seeds).values()]
        if found:
            steps = [point[0] for point in found[0]]
            curves[TITLES[connector]] = steps, np.mean([[point[1] for point in curve] for curve in found], 0).tolist()
    return curves


def claims(results: Results) -> list[str]:
    lines = []
    for encoder in results.options.encoders:
        for other in results.options.connectors:
            found = None if other == "align" else difference(results, "align", other, encoder)
            if found is not None:
                lines.append(
                    f"{verdict(found)}: ALIGN answers more than {TITLES[other]}, {ENCODER_TITLES[encoder]}: "
                    f"{found.signed()} of the questions."
                )
    return lines


PART = Part("accuracy", "Accuracy under one recipe", jobs, run, section, claims)
