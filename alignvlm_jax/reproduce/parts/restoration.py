"""Covered print restored, after VCR: by every model of the main table as it is, and once it has gone on to learn it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data.synthetic import restoration
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.metrics import vcr_scores
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job, Result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import accuracy
from alignvlm_jax.reproduce.statistics import estimate, verdict
from alignvlm_jax.reproduce.work import Work

DATASET = "restoration"
DIFFICULTIES = ("easy", "hard")
SHARE = 1 / 2
"""Steps, as a share of those of the recipe's last stage, of which this is a continuation."""

BEFORE = "before "
"""What stands before a difficulty's name, of a model that has not been trained for it."""

_SEED = 1  # other pages than the main corpus
_MAX_NEW_TOKENS = 48


def build(folder: Path, sizes: dict[str, int]) -> None:
    """Draws the pages, as many a split as the main corpus has."""
    restoration.build_restoration_corpus(folder / DATASET, seed=_SEED, sizes=sizes)


def job(connector: str, encoder: str, seed: int) -> Job:
    needs = (accuracy.job(connector, encoder, seed).name,)
    return Job("restoration", encoder, connector, seed, needs=needs, needs_weights=True, wave=seed, weight=0.5)


def jobs(options: Options) -> list[Job]:
    """On the first encoder alone: the fair one, if it is asked for."""
    encoder = options.encoders[0]
    return [job(name, encoder, seed) for seed in range(options.seeds) for name in recipe.connectors(options)]


def run(work: Work) -> dict[str, Any]:
    vcr_scores("", ["a"], "en")  # said before it is trained, if the scorer is not installed
    start = accuracy.job(work.job.connector, work.job.encoder, work.job.seed)
    found = {BEFORE + difficulty: scores for difficulty, scores in _ask(work, work.reader(start)).items()}
    work.train(continued(work.experiment(), start.workdir(work.out)))
    return found | _ask(work, work.reader())


def _ask(work: Work, reader: Reader) -> dict[str, Result]:
    """The scores of a model, by difficulty."""
    records = work.records("heldout", DATASET)
    report = runner.evaluate(reader, records, limit=work.options.questions, max_new_tokens=_MAX_NEW_TOKENS)
    return {difficulty: _scores([a for a in report.answers if a.family == difficulty]) for difficulty in DIFFICULTIES}


def continued(config: ExperimentConfig, start: Path) -> ExperimentConfig:
    """A last stage behind the recipe's, of covered pages and of questions about plain ones, half and half.

    The connector, which speaks by now, has the rate of the other parts: at those it was tuned to learn by, it would
    have to begin again.
    """
    last = config.stages[-1]
    mixture = (MixturePart(DATASET, "train", "qa", 1.0), MixturePart("documents", "train", "qa", 1.0))
    stage = dataclasses.replace(last, name="restore", mixture=mixture, steps=max(1, round(last.steps * SHARE)))
    rates = dataclasses.replace(last.learning_rates, connector=last.learning_rates.language)
    stage = dataclasses.replace(stage, learning_rates=rates, warmup_steps=min(last.warmup_steps, stage.steps - 1))
    return dataclasses.replace(config, stages=(stage,), init_from=str(start))


def _scores(answers: Sequence[runner.Answer]) -> dict[str, Any]:
    """VCR's two scores, one entry for each page; of the intervals a page is one draw."""
    exact, jaccard = [], []
    for answer in answers:
        of_exact, of_jaccard = vcr_scores(answer.predicted, [answer.expected], "en")
        exact, jaccard = exact + of_exact, jaccard + of_jaccard
    return {
        "exact_match": round(float(np.mean(exact)), 4),
        "jaccard": round(float(np.mean(jaccard)), 4),
        "exact": "".join(str(int(value)) for value in exact),
        "jaccards": [round(value, 3) for value in jaccard],
        "questions": [1] * len(answers),
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
            before = [run[BEFORE + difficulty] for run in runs.values()]
            exact = estimate(np.array([_exact(one) for one in found]), found[0]["questions"])
            jaccard = estimate(np.array([one["jaccards"] for one in found]), found[0]["questions"])
            bars[difficulty][TITLES[connector]] = exact
            untrained = estimate(np.array([_exact(one) for one in before]), before[0]["questions"])
            cells += [str(untrained), str(exact), str(jaccard)]
        lines.append(f"| {TITLES[connector]} | {' | '.join(cells)} |")
    columns = [f"{difficulty}, {what}" for difficulty in DIFFICULTIES for what in ("as it was", "trained", "Jaccard")]
    table = [f"| connector | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    what = (
        "The answer to one of a page's questions struck through by bars of the paper's colour, an eighth (easy) or "
        "a quarter (hard) of a capital's height, to be read all the same. *As it was*: exact match of the models of "
        "the main table, which never saw covered print. *Trained*: each goes on from there, for "
        f"{SHARE:.0%} of its last stage's steps, on covered pages and plain questions half and half, all parts at the "
        "rate of the decoder; one training for both difficulties. Exact match and Jaccard (once trained) by VCR's own "
        f"rules. On the {ENCODER_TITLES[options.encoders[0]]}."
    )
    parts = [what, "", *table, *lines, ""]
    if lines:
        plots.bars(folder / "restoration.svg", bars, "covered answers restored exactly")
        parts += ["![Share of covered answers restored, by connector](restoration.svg)", ""]
    return "\n".join([*parts, results.missing(jobs(options))])


def claims(results: Results) -> list[str]:
    lines, first, second = [], _runs(results, "align"), _runs(results, "mlp")
    seeds = sorted(first.keys() & second.keys())
    for difficulty in DIFFICULTIES if seeds else ():
        values = np.array([_exact(first[seed][difficulty]) - _exact(second[seed][difficulty]) for seed in seeds])
        lead = estimate(values, first[seeds[0]][difficulty]["questions"])
        says = f"ALIGN restores more of what is covered ({difficulty}) than MLP: {lead.signed()}."
        lines.append(f"{verdict(lead)}: {says}")
    return lines


PART = Part("restoration", "Covered print restored", jobs, run, section, claims)
