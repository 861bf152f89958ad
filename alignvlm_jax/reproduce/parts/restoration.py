"""Restoration of covered print, modeled on VCR: by the models of the main table, before and after training for it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

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
"""Steps of the additional training, as a share of the steps of the recipe's last stage."""

BEFORE = "before "
"""Prefix of a difficulty's name for the scores of a model before it is trained for restoration."""

_SEED = 1  # other pages than the main corpus
_MAX_NEW_TOKENS = 48


def build(folder: Path, sizes: dict[str, int]) -> None:
    """Draws the pages, as many per split as in the main corpus."""
    restoration.build_restoration_corpus(folder / DATASET, seed=_SEED, sizes=sizes)


def job(connector: str, encoder: str, seed: int) -> Job:
    """Returns the run that continues from the model of the main table."""
    needs = (accuracy.job(connector, encoder, seed).name,)
    return Job("restoration", encoder, connector, seed, needs=needs, needs_weights=True, wave=seed, weight=0.5)


def jobs(options: Options) -> list[Job]:
    """Returns the runs on the first encoder: the fair one, if it is among the options."""
    encoder = options.encoders[0]
    return [job(name, encoder, seed) for seed in range(options.seeds) for name in recipe.connectors(options)]


def run(work: Work) -> dict[str, Any]:
    """Scores the model of the main table, trains it for restoration, and scores it again."""
    vcr_scores("", ["a"], "en")  # fails here, before any training, if the scorer is not installed
    start = accuracy.job(work.job.connector, work.job.encoder, work.job.seed)
    # The training starts from the weights of the main table, so the comparison is within one model.
    found = {BEFORE + difficulty: scores for difficulty, scores in _ask(work, work.reader(start)).items()}
    work.train(continued(work.experiment(), start.workdir(work.out)))
    return found | _ask(work, work.reader())


def _ask(work: Work, reader: Reader) -> dict[str, Result]:
    """Returns the scores of a model, by difficulty."""
    records = work.records("heldout", DATASET)
    report = runner.evaluate(reader, records, limit=work.options.questions, max_new_tokens=_MAX_NEW_TOKENS)
    return {difficulty: _scores([a for a in report.answers if a.family == difficulty]) for difficulty in DIFFICULTIES}


def continued(config: ExperimentConfig, start: Path) -> ExperimentConfig:
    """Returns the config of an additional stage: half covered pages, half questions about plain pages.

    The connector has the learning rate of the decoder. At the rate that was tuned for training from scratch, it would
    lose what it has learned.
    """
    last = config.stages[-1]
    mixture = (MixturePart(DATASET, "train", "qa", 1.0), MixturePart("documents", "train", "qa", 1.0))
    stage = dataclasses.replace(last, name="restore", mixture=mixture, steps=max(1, round(last.steps * SHARE)))
    rates = dataclasses.replace(last.learning_rates, connector=last.learning_rates.language)
    stage = dataclasses.replace(stage, learning_rates=rates, warmup_steps=min(last.warmup_steps, stage.steps - 1))
    return dataclasses.replace(config, stages=(stage,), init_from=str(start))


def _scores(answers: Sequence[runner.Answer]) -> dict[str, Any]:
    """Returns the two scores of VCR, with one entry per page. Each page counts as one draw for the intervals."""
    exact, jaccard = [], []
    for answer in answers:
        answer_exact, answer_jaccard = vcr_scores(answer.predicted, [answer.expected], "en")
        exact, jaccard = exact + answer_exact, jaccard + answer_jaccard
    return {
        "exact_match": round(float(np.mean(exact)), 4),
        "jaccard": round(float(np.mean(jaccard)), 4),
        "exact": "".join(str(int(value)) for value in exact),
        "jaccards": [round(value, 3) for value in jaccard],
        "questions": [1] * len(answers),
    }


def _runs(results: Results, connector: str) -> dict[int, Result]:
    encoder = results.options.encoders[0]
    runs = results.by_seed(lambda seed: job(connector, encoder, seed))
    return {seed: result["found"] for seed, result in runs.items()}


def _exact(scores: Result) -> Int[np.ndarray, " pages"]:
    return np.array([int(digit) for digit in scores["exact"]])


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report and writes its plot."""
    options, lines, bars = results.options, [], {difficulty: {} for difficulty in DIFFICULTIES}
    # A row for each connector: exact match before and after training, and Jaccard, for each difficulty.
    for connector in options.connectors:
        runs = _runs(results, connector)
        if not runs:
            continue
        cells = []
        for difficulty in DIFFICULTIES:
            after = [run[difficulty] for run in runs.values()]
            before = [run[BEFORE + difficulty] for run in runs.values()]
            exact = estimate(np.array([_exact(scores) for scores in after]), after[0]["questions"])
            jaccard = estimate(np.array([scores["jaccards"] for scores in after]), after[0]["questions"])
            bars[difficulty][TITLES[connector]] = exact
            untrained = estimate(np.array([_exact(scores) for scores in before]), before[0]["questions"])
            cells += [str(untrained), str(exact), str(jaccard)]
        lines.append(f"| {TITLES[connector]} | {' | '.join(cells)} |")
    columns = [f"{difficulty}, {name}" for difficulty in DIFFICULTIES for name in ("before", "trained", "Jaccard")]
    table = [f"| connector | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    introduction = (
        "Bars in the color of the page strike through the answer to one question of each page, with a height of an "
        "eighth (easy) or a quarter (hard) of a capital. The model has to read the answer all the same.\n\n"
        "- *Before*: exact match of the models of the main table, which never saw covered print.\n"
        f"- *Trained*: each model continues for {SHARE:.0%} of the steps of its last stage, half on covered pages and "
        "half on plain questions, with all parts at the learning rate of the decoder. One training covers both "
        "difficulties.\n"
        "- Exact match and Jaccard (after training) follow the rules of VCR.\n"
        f"- Measured on the {ENCODER_TITLES[options.encoders[0]]}."
    )
    parts = [introduction, "", *table, *lines, ""]
    if lines:
        plots.bars(folder / "restoration.svg", bars, "covered answers restored exactly")
        parts += ["![Share of covered answers restored, by connector](restoration.svg)", ""]
    return "\n".join([*parts, results.missing(jobs(options))])


def claims(results: Results) -> list[str]:
    """Returns the claims that ALIGN restores more than MLP."""
    lines, first, second = [], _runs(results, "align"), _runs(results, "mlp")
    seeds = sorted(first.keys() & second.keys())
    for difficulty in DIFFICULTIES if seeds else ():
        values = np.array([_exact(first[seed][difficulty]) - _exact(second[seed][difficulty]) for seed in seeds])
        lead = estimate(values, first[seeds[0]][difficulty]["questions"])
        lines.append(f"{verdict(lead)}: ALIGN restores more covered answers ({difficulty}) than MLP: {lead.signed()}.")
    return lines


PART = Part("restoration", "Covered print restored", jobs, run, section, claims)
