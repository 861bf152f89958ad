"""The connector's learning rate: as many trials for each connector, over the same grid, judged on validation pages."""

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
    """The trials of a connector on an encoder."""
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
    return [
        job
        for encoder in options.encoders
        for connector in recipe.connectors(options)
        for job in trials(connector, encoder)
    ]


def run(work: Work) -> dict[str, Any]:
    config = work.experiment(factor=work.job["factor"], steps=recipe.TUNING_SHARE)
    work.train(work.on_pages(config, 1.0))
    return {}


def chosen_factor(out: Path, connector: str, encoder: str) -> float:
    """The factor of the trial with the least validation loss.

    Raises:
      UserError: none of them ended in a finite loss.
    """
    found = {job["factor"]: read_result(out, job) for job in trials(connector, encoder)}
    losses = {factor: _loss(result) for factor, result in found.items()}
    best = min(losses, key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        raise UserError(f"no trial of {connector} on {encoder} came to a finite loss: see {out}/runs/tuning")
    return best


def _loss(result: Result | None) -> float:
    loss = math.inf if result is None else result.get("validation_loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def section(results: Results, folder: Path) -> str:
    lines = [
        f"{len(recipe.RATE_FACTORS)} trials for every connector on every encoder, each with {recipe.TUNING_SHARE:.0%} "
        "of a run's steps, with seed 0: the recipe's learning rates of the connector times a factor, all else equal. "
        "The trial with the least loss on validation questions (nats per answer token) is taken; held-out pages are "
        "not looked at.",
        "",
        "| encoder | connector | " + " | ".join(f"x {factor:g}" for factor in recipe.RATE_FACTORS) + " |",
        "|---|---|" + "---:|" * len(recipe.RATE_FACTORS),
    ]
    for encoder in results.options.encoders:
        for connector in results.options.connectors:
            found = results.complete(trials(connector, encoder))
            losses = {job["factor"]: _loss(result) for job, result in found.items()}
            least = min(losses.values(), default=None)
            cells = [_cell(losses.get(factor), least) for factor in recipe.RATE_FACTORS]
            lines.append(f"| {ENCODER_TITLES[encoder]} | {TITLES[connector]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", results.missing(jobs(results.options))])


def _cell(loss: float | None, least: float | None) -> str:
    if loss is None:
        return ""
    return f"**{loss:.3f}**" if loss == least else f"{loss:.3f}"


PART = Part("tuning", "How the learning rates were chosen", jobs, run, section)
