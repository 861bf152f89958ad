"""The connector's learning rate: the same number of trials for each connector, on one grid, by validation loss."""

import math
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.reproduce import recipe
from alignvlm_jax.reproduce.jobs import Job, Result, read_result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.work import Work


def trials(connector: str, encoder: str) -> list[Job]:
    """Returns the trials of a connector on an encoder."""
    return [
        Job(
            "tuning",
            encoder,
            connector,
            variant=f"rate-x{factor:g}",
            setting=(("factor", factor),),
            weight=recipe.TUNING_SHARE,
        )
        for factor in recipe.RATE_FACTORS
    ]


def jobs(options: Options) -> list[Job]:
    """Returns the trials of all connectors and encoders."""
    return [
        job
        for encoder in options.encoders
        for connector in recipe.connectors(options)
        for job in trials(connector, encoder)
    ]


def run(work: Work) -> dict[str, Any]:
    """Trains for a share of the steps. The validation loss is part of every training's result."""
    config = work.experiment(factor=work.job["factor"], steps=recipe.TUNING_SHARE)
    work.train(work.on_pages(config, 1.0))
    return {}


def chosen_factor(out: Path, connector: str, encoder: str) -> float:
    """Returns the factor of the trial with the lowest validation loss.

    Raises:
      UserError: if no trial has a finite loss.
    """
    results = {job["factor"]: read_result(out, job) for job in trials(connector, encoder)}
    losses = {factor: _loss(result) for factor, result in results.items()}
    best = min(losses, key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        raise UserError(f"no trial of {connector} on {encoder} reached a finite loss; see {out}/runs/tuning")
    return best


def _loss(result: Result | None) -> float:
    """Returns the validation loss; infinity for a missing result and for NaN, which `min` cannot order."""
    loss = math.inf if result is None else result.get("validation_loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report."""
    lines = [
        f"{len(recipe.RATE_FACTORS)} trials for every connector on every encoder, each with {recipe.TUNING_SHARE:.0%} "
        "of the steps of a run and seed 0. A trial multiplies the recipe's learning rates of the connector by a "
        "factor; all else is equal.\n\nThe factor with the lowest loss on validation questions (nats per answer "
        "token, in bold) is used. Held-out pages play no part in the choice.",
        "",
        "| encoder | connector | " + " | ".join(f"x {factor:g}" for factor in recipe.RATE_FACTORS) + " |",
        "|---|---|" + "---:|" * len(recipe.RATE_FACTORS),
    ]
    for encoder in results.options.encoders:
        for connector in results.options.connectors:
            complete = results.complete(trials(connector, encoder))
            losses = {job["factor"]: _loss(result) for job, result in complete.items()}
            lowest = min(losses.values(), default=None)
            cells = [_cell(losses.get(factor), lowest) for factor in recipe.RATE_FACTORS]
            lines.append(f"| {ENCODER_TITLES[encoder]} | {TITLES[connector]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", results.missing(jobs(results.options))])


def _cell(loss: float | None, lowest: float | None) -> str:
    if loss is None:
        return ""
    return f"**{loss:.3f}**" if loss == lowest else f"{loss:.3f}"


PART = Part("tuning", "How the learning rates were chosen", jobs, run, section)
