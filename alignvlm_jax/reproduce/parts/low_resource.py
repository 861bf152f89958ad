"""Training on a sixteenth and a quarter of the pages, for the same number of steps, so each page is seen more often."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from alignvlm_jax.interop.start import load_config
from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job, Result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import accuracy, tuning
from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict
from alignvlm_jax.reproduce.work import Work, digits

FRACTIONS = (1 / 16, 1 / 4)
_CONNECTORS = ("align", "mlp", "ovis")


def job(connector: str, encoder: str, fraction: float, seed: int) -> Job:
    """Returns the job that trains on a fraction of the data. A fraction of 1 is the job of the main table."""
    if fraction == 1:
        return accuracy.job(connector, encoder, seed)
    needs = tuple(trial.name for trial in tuning.trials(connector, encoder))
    setting = (("fraction", fraction),)
    variant = f"of-{1 / fraction:g}"
    return Job("low_resource", encoder, connector, seed, variant, setting, needs, wave=seed, weight=1.2)


def _connectors(options: Options) -> list[str]:
    return [name for name in recipe.connectors(options) if name in _CONNECTORS]


def jobs(options: Options) -> list[Job]:
    """Returns the jobs, all of them with the first encoder: `FAIR`, if the options include it."""
    return [
        job(connector, options.encoders[0], fraction, seed)
        for seed in range(options.seeds)
        for fraction in FRACTIONS
        for connector in _connectors(options)
    ]


def run(work: Work) -> dict[str, Any]:
    """Trains on the job's fraction with the tuned learning rate, and scores the held-out questions."""
    factor = tuning.chosen_factor(work.out, work.job.connector, work.job.encoder)
    work.train(work.on_pages(work.experiment(factor=factor), work.job["fraction"]))
    return {"heldout": work.score(work.reader(), work.records("heldout"), work.options.questions)}


def _runs(results: Results, connector: str, fraction: float) -> dict[int, Result]:
    encoder = results.options.encoders[0]
    runs = results.by_seed(lambda seed: job(connector, encoder, fraction, seed))
    return {seed: result["found"]["heldout"] for seed, result in runs.items()}


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report and writes its plot."""
    options, curves, lines = results.options, {}, []
    # For each connector, add a row to the table, and a curve over the fractions that have results.
    for connector in _connectors(options):
        runs_by_fraction = {fraction: _runs(results, connector, fraction) for fraction in (*FRACTIONS, 1)}
        values = {
            fraction: estimate(np.array([digits(run) for run in runs.values()]), next(iter(runs.values()))["questions"])
            for fraction, runs in runs_by_fraction.items()
            if runs
        }
        cells = [str(values.get(fraction, "")) for fraction in (*FRACTIONS, 1)]
        lines.append(f"| {TITLES[connector]} | {' | '.join(cells)} |")
        if values:
            curves[TITLES[connector]] = list(values), list(values.values())
    pages = recipe.pages_seen(load_config(options.config, options.overrides).stages)
    header = " | ".join(f"{pages * fraction:,.0f} pages" for fraction in (*FRACTIONS, 1))
    table = [f"| connector | {header} |", "|---|---|---|---|", *lines, ""]
    if curves:
        panels = {ENCODER_TITLES[options.encoders[0]]: curves}
        label = "share of the pages"
        plots.curves(
            folder / "low_resource.svg", panels, label, "questions answered exactly right", logarithmic=(True, False)
        )
        table += ["![Share of held-out questions answered right, by amount of data](low_resource.svg)", ""]
    introduction = (
        "The number of steps stays the same, so with fewer pages, each page is seen more often. The last column is the "
        "run of the main table, which sees each page once per stage. Measured on the "
        f"{ENCODER_TITLES[options.encoders[0]]}, with the learning rates chosen on all pages."
    )
    return "\n".join([introduction, "", *table, results.missing(jobs(options))])


def _lead(results: Results, other: str, fraction: float) -> tuple[Int[np.ndarray, "seeds questions"], list[int]] | None:
    """Returns ALIGN's right answers minus those of another connector, and the number of questions on each page.

    Returns None if no seed has results of both.
    """
    first, second = _runs(results, "align", fraction), _runs(results, other, fraction)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    return np.array([digits(first[seed]) - digits(second[seed]) for seed in seeds]), first[seeds[0]]["questions"]


def claims(results: Results) -> list[str]:
    """Returns the claims about ALIGN's lead with little data, and about how much larger it is than with all data."""
    lines = []
    for other in ("mlp", "ovis"):
        few, all_pages = _lead(results, other, FRACTIONS[0]), _lead(results, other, 1)
        if few is None or all_pages is None:
            continue
        lead = estimate(*few)
        lines.append(
            f"{verdict(lead)}: with a sixteenth of the data, ALIGN answers more questions than {TITLES[other]}: "
            f"{lead.signed()}."
        )
        # The growth of the lead is paired by seed, so both leads must have the same seeds.
        if len(few[0]) == len(all_pages[0]):
            growth: Estimate = estimate(few[0] - all_pages[0], few[1])
            lines.append(
                f"{verdict(growth)}: ALIGN's lead over {TITLES[other]} is larger with a sixteenth of the data than "
                f"with all of it: {growth.signed()}."
            )
    return lines


PART = Part("low_resource", "Fewer pages", jobs, run, section, claims)
