"""Noise on the vision features just before the connector: the loss of score of each connector."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from alignvlm_jax.analysis.noise.measure import feature_distances
from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job, Result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import accuracy
from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict
from alignvlm_jax.reproduce.work import Work, digits

# The spread of the features differs between encoders, and between trainings of one encoder with different connectors,
# so the same sigma is not the same noise. The curves therefore use sigma relative to the deviation of the features. The
# paper's absolute sigma is an additional point.
RELATIVE_SIGMAS = (0.25, 0.5, 1.0, 2.0)
PAPER_SIGMA = 3.0
_CLAIM_SIGMA = 1.0
_PAGES = 32


def job(connector: str, encoder: str, seed: int) -> Job:
    """Returns the measurement on the trained model of the main table."""
    needs = (accuracy.job(connector, encoder, seed).name,)
    return Job("noise", encoder, connector, seed, needs=needs, needs_weights=True, wave=seed, weight=0.4)


def jobs(options: Options) -> list[Job]:
    """Returns the measurements of all connectors and encoders, seed by seed."""
    return [
        job(connector, encoder, seed)
        for seed in range(options.seeds)
        for encoder in options.encoders
        for connector in recipe.connectors(options)
    ]


def run(work: Work) -> dict[str, Any]:
    """Measures scores and distances at every sigma."""
    reader = work.reader(accuracy.job(work.job.connector, work.job.encoder, work.job.seed))
    records = work.records("heldout")
    # The deviation comes first, because the sigmas are in its units.
    deviation = feature_distances(reader, records, (), pages=_PAGES).feature_deviation
    sigmas = {f"{share:g}": share * deviation for share in (0.0, *RELATIVE_SIGMAS)} | {"paper": PAPER_SIGMA}
    distances = feature_distances(reader, records, list(sigmas.values()), pages=_PAGES)
    points = {}
    for (name, sigma), (plain, text_centered, token_centered) in zip(sigmas.items(), distances.by_sigma, strict=True):
        noisy = reader.with_feature_noise(sigma) if sigma else reader
        points[name] = {
            "sigma": round(sigma, 4),
            **work.score(noisy, records, work.options.analysed, title=f"noise of sigma {sigma:.2f}"),
            "cosine_distance": round(float(plain), 5),
            "centred_cosine_distance": round(float(text_centered), 5),
            "token_centred_cosine_distance": round(float(token_centered), 5),
        }
    return {"feature_deviation": round(deviation, 4), "points": points}


def _runs(results: Results, connector: str, encoder: str) -> dict[int, Result]:
    runs = results.by_seed(lambda seed: job(connector, encoder, seed))
    return {seed: result["found"] for seed, result in runs.items()}


def _loss(results: Results, connector: str, encoder: str, point: str, against: str | None = None) -> Estimate | None:
    """Returns the loss of score at a point, or with `against`, that connector's loss minus the loss of this one."""
    # The same seeds and questions on both sides make the difference a paired one.
    runs = _runs(results, connector, encoder)
    others = runs if against is None else _runs(results, against, encoder)
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return None

    def losses(runs: dict[int, Result]) -> Int[np.ndarray, "seeds questions"]:
        return np.array([digits(runs[seed]["points"]["0"]) - digits(runs[seed]["points"][point]) for seed in seeds])

    values = losses(runs) if against is None else losses(others) - losses(runs)
    return estimate(values, runs[seeds[0]]["points"]["0"]["questions"])


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report and writes its plot."""
    options, panels, lines = results.options, {}, []
    # A table and a panel for each encoder, with a row and a curve for each connector.
    for encoder in options.encoders:
        curves, rows = {}, []
        for connector in options.connectors:
            runs = _runs(results, connector, encoder)
            if not runs:
                continue
            points = [next(iter(runs.values()))["points"][f"{share:g}"] for share in (0.0, *RELATIVE_SIGMAS)]
            values = [
                estimate(np.array([digits(run["points"][f"{share:g}"]) for run in runs.values()]), point["questions"])
                for share, point in zip((0.0, *RELATIVE_SIGMAS), points, strict=True)
            ]
            curves[TITLES[connector]] = (0.0, *RELATIVE_SIGMAS), values
            rows.append(_row(results, connector, encoder, runs, values[0]))
        if curves:
            panels[ENCODER_TITLES[encoder]] = curves
            lines += [f"### {ENCODER_TITLES[encoder].capitalize()}", "", _HEADER, _RULE, *rows, ""]
    if panels:
        label = "sigma / deviation of the features"
        plots.curves(folder / "noise.svg", panels, label, "questions answered exactly right")
        lines += ["![Share of questions answered right under noise on the features](noise.svg)", ""]
    introduction = _INTRODUCTION.format(questions=options.analysed)
    return "\n".join([introduction, "", *lines, results.missing(jobs(options))])


_INTRODUCTION = (
    "Gaussian noise on the features before the connector, on the first {questions} held-out questions, with the models "
    "of the table above.\n\n"
    "- The spread of the features differs between models. Sigma is therefore in units of their own standard deviation. "
    "The paper's absolute sigma of 3 has its own column.\n"
    "- *Cosine distance* is between visual tokens with and without noise, at sigma 1 and at the paper's 3. It is "
    "given as in the paper, after subtracting the mean text embedding, and after subtracting the connector's own "
    "mean visual token.\n"
    "- The first two distances flatter a connector whose tokens all lie near one vector, as ALIGN's do: the shared "
    "part hides the changes. The last one does not."
)
_DISTANCES = {
    "cosine_distance": "cosine distance",
    "centred_cosine_distance": "minus mean text embedding",
    "token_centred_cosine_distance": "minus mean visual token",
}
_HEADER = (
    "| connector | without noise | lost at sigma 1 | lost at the paper's 3 | 3 in deviations | "
    f"{' | '.join(_DISTANCES.values())} |"
)
_RULE = "|---|---|---|---|---:|---:|---:|---:|"


def _row(results: Results, connector: str, encoder: str, runs: dict[int, Result], clean: Estimate) -> str:
    def distance(name: str) -> str:
        means = (np.mean([run["points"][point][name] for run in runs.values()]) for point in ("1", "paper"))
        return ", ".join(f"{mean:.3f}" for mean in means)

    cells = [
        str(clean),
        _loss(results, connector, encoder, "1"),
        _loss(results, connector, encoder, "paper"),
        f"{PAPER_SIGMA / np.mean([run['feature_deviation'] for run in runs.values()]):.2f}",
        *map(distance, _DISTANCES),
    ]
    return f"| {TITLES[connector]} | {' | '.join(str(cell) for cell in cells)} |"


def claims(results: Results) -> list[str]:
    """Returns the claims that noise costs ALIGN less than MLP."""
    lines = []
    for encoder in results.options.encoders:
        saved = _loss(results, "align", encoder, f"{_CLAIM_SIGMA:g}", against="mlp")
        if saved is not None:
            lines.append(
                f"{verdict(saved)}: noise as large as the deviation of the features costs ALIGN fewer questions than "
                f"MLP ({ENCODER_TITLES[encoder]}): {saved.signed()}."
            )
    return lines


PART = Part("noise", "Noise on the features", jobs, run, section, claims)
