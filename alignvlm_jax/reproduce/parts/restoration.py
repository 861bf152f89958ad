"""Covered print restored, after VCR: every model of the main table goes on to learn it, for as many steps."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.config import ExperimentConfig
from alignvlm_jax.data.synthetic import restoration
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.metrics import vcr_scores
from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job, Result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import accuracy, tuning
from alignvlm_jax.reproduce.statistics import estimate, verdict
from alignvlm_jax.reproduce.work import Work
from alignvlm_jax.training.stages import MixturePart

DATASET = "restoration"
DIFFICULTIES = ("easy", "hard")
SHARE = 1 / 2
"""Steps, as a share of those of the recipe's last stage, of which this is a continuation."""

_SEED = 1  # other pages than the main corpus
_MAX_NEW_TOKENS = 48


def build(folder: Path, sizes: dict[str, int]) -> None:
    """Draws the pages, as many a split as the main corpus has."""
    restoration.build_restoration_corpus(folder / DATASET, seed=_SEED, sizes=sizes)


def job(connector: str, encoder: str, seed: int) -> Job:
    needs = (accuracy.job(connector, encoder, seed).name,)
    return Job("restoration", encoder, connector, seed, needs=needs, takes_weights=True, wave=seed, weight=0.5)


def jobs(options: Options) -> list[Job]:
    """On the first encoder alone: the fair one, if it is asked for."""
    encoder = options.encoders[0]
    return [job(name, encoder, seed) for seed in range(options.seeds) for name in recipe.connectors(options)]


def run(work: Work) -> dict[str, Any]:
    vcr_scores("", ["a"], "en")  # said before it is trained, if the scorer is not installed
    start = accuracy.job(work.job.connector, work.job.encoder, work.job.seed)
    factor = tuning.chosen_factor(work.out, work.job.connector, work.job.encoder)
    work.train(continued(work.experiment(factor=factor), start.workdir(work.out)))
    records = work.records("heldout", DATASET)
    limit = None if work.options.questions is None else work.options.questions
    report = runner.evaluate(work.reader(), records, limit=limit, max_new_tokens=_MAX_NEW_TOKENS)
    return {difficulty: _scores([a for a in report.answers if a.family == difficulty]) for difficulty in DIFFICULTIES}


def continued(config: ExperimentConfig, start: Path) -> ExperimentConfig:
    """A last stage behind the recipe's, of covered pages and of questions about plain ones, half and half."""
    last = config.stages[-1]
    mixture = (MixturePart(DATASET, "train", "qa", 1.0), MixturePart("documents", "train", "qa", 1.0))
    stage = dataclasses.replace(last, name="restore", mixture=mixture, steps=max(1, round(last.steps * SHARE)))
    stage = dataclasses.replace(stage, warmup_steps=min(last.warmup_steps, stage.steps - 1))
    return dataclasses.replace(config, stages=(stage,), init_from=str(start))


def _scores(answers: Sequence[runner.Answer]) -> dict[str, Any]:
    """VCR's two scores, one entry for each covered line; `questions` counts the lines of a page."""
    exact, jaccard, lines = [], [], []
    for answer in answers:
        covered = restoration.references(answer.expected)
        of_exact, of_jaccard = vcr_scores(answer.predicted, covered, "en")
        exact, jaccard = exact + of_exact, jaccard + of_jaccard
        lines.append(len(covered))
    return {
        "exact_match": round(float(np.mean(exact)), 4),
        "jaccard": round(float(np.mean(jaccard)), 4),
        "exact": "".join(str(int(value)) for value in exact),
        "jaccards": [round(value, 3) for value in jaccard],
        "questions": lines,
    }


def _runs(results: Results, connector: str) -> dict[int, Result]:
    encoder = results.options.encoders[0]
    seeds = {job(connector, encoder, seed): seed for seed in range(results.options.seeds)}
    return {seeds[one]: result["found"] for one, result in results.complete(list(seeds)).items()}


def _exact(found: Result) -> np.ndarray:
    return np.array([int(digit) for digit in found["exact"]])


def section(results: Results, folder: Path) -> str:
    options, lines, bars = results.options, [], {difficulty: {} for difficulty in DIFFICULTIES}
    for connector in options.connectors:
        runs = _runs(results, connector)
        if not runs:
            continue
        cells = []
        for difficulty in DIFFICULTIES:
            found = [run[difficulty] for run in runs.values()]
            exact = estimate(np.array([_exact(one) for one in found]), found[0]["questions"])
            jaccard = estimate(np.array([one["jaccards"] for one in found]), found[0]["questions"])
            bars[difficulty][TITLES[connector]] = exact
            cells += [str(exact), str(jaccard)]
        lines.append(f"| {TITLES[connector]} | {' | '.join(cells)} |")
    table = ["| connector | easy, exact | easy, Jaccard | hard, exact | hard, Jaccard |", "|---|---|---|---|---|"]
    what = (
        "One or two lines of a page struck through by bars of the paper's colour, a quarter (easy) or half (hard) of a "
        "capital's height, to be read all the same. Each model of the main table goes on from where it was, for "
        f"{SHARE:.0%} of its last stage's steps, on covered pages and plain questions half and half; one training for "
        f"both difficulties. Scored by VCR's own rules over covered lines. On the "
        f"{ENCODER_TITLES[options.encoders[0]]}."
    )
    parts = [what, "", *table, *lines, ""]
    if lines:
        plots.bars(folder / "restoration.svg", bars, "covered lines restored exactly")
        parts += ["![Share of covered lines restored, by connector](restoration.svg)", ""]
    return "\n".join([*parts, results.missing(jobs(options))])


def claims(results: Results) -> list[str]:
    lines, first, second = [], _runs(results, "align"), _runs(results, "mlp")
    seeds = sorted(first.keys() & second.keys())
    for difficulty in DIFFICULTIES if seeds else ():
        values = np.array([_exact(first[seed][difficulty]) - _exact(second[seed][difficulty]) for seed in seeds])
        lead = estimate(values, first[seeds[0]][difficulty]["questions"])
        lines.append(f"{verdict(lead)}: ALIGN restores more {difficulty} covered lines than MLP: {lead.signed()}.")
    return lines


PART = Part("restoration", "Covered print restored", jobs, run, section, claims)
