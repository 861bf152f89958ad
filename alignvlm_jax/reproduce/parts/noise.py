"""Noise on the vision features just before the connector: how far each connector's score falls."""

from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.analysis.noise.measure import feature_distances
from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job, Result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import accuracy
from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict
from alignvlm_jax.reproduce.work import Work, digits

# Encoders, and one encoder trained with different connectors, have features of different spread: the same sigma is not
# the same noise. So curves go by sigma over the features' own deviation; the paper's sigma is a point of its own.
RELATIVE_SIGMAS = (0.25, 0.5, 1.0, 2.0)
PAPER_SIGMA = 3.0
_CLAIM = 1.0
_PAGES = 32


def job(connector: str, encoder: str, seed: int) -> Job:
    needs = (accuracy.job(connector, encoder, seed).name,)
    return Job("noise", encoder, connector, seed, needs=needs, needs_weights=True, wave=seed, weight=0.4)


def jobs(options: Options) -> list[Job]:
    return [
        job(connector, encoder, seed)
        for seed in range(options.seeds)
        for encoder in options.encoders
        for connector in recipe.connectors(options)
    ]


def run(work: Work) -> dict[str, Any]:
    reader = work.reader(accuracy.job(work.job.connector, work.job.encoder, work.job.seed))
    records = work.records("heldout")
    deviation = feature_distances(reader, records, (), pages=_PAGES).feature_deviation
    sigmas = {f"{share:g}": share * deviation for share in (0.0, *RELATIVE_SIGMAS)} | {"paper": PAPER_SIGMA}
    distances = feature_distances(reader, records, list(sigmas.values()), pages=_PAGES)
    points = {}
    for (name, sigma), (plain, centred, of_tokens) in zip(sigmas.items(), distances.by_sigma, strict=True):
        noisy = reader.with_feature_noise(sigma) if sigma else reader
        points[name] = {
            "sigma": round(sigma, 4),
            **work.score(noisy, records, work.options.analysed, title=f"noise of sigma {sigma:.2f}"),
            "cosine_distance": round(float(plain), 5),
            "centred_cosine_distance": round(float(centred), 5),
            "token_centred_cosine_distance": round(float(of_tokens), 5),
        }
    return {"feature_deviation": round(deviation, 4), "points": points}


def _runs(results: Results, connector: str, encoder: str) -> dict[int, Result]:
    seeds = {job(connector, encoder, seed): seed for seed in range(results.options.seeds)}
    return {seeds[one]: result["found"] for one, result in results.complete(list(seeds)).items()}


def _drop(results: Results, connector: str, encoder: str, point: str, against: str | None = None) -> Estimate | None:
    """What the noise costs the connector; with `against`, how much less than it costs that one."""
    runs = _runs(results, connector, encoder)
    others = runs if against is None else _runs(results, against, encoder)
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return None

    def loss(of: dict[int, Result]) -> np.ndarray:
        return np.array([digits(of[seed]["points"]["0"]) - digits(of[seed]["points"][point]) for seed in seeds])

    values = loss(runs) if against is None else loss(others) - loss(runs)
    return estimate(values, runs[seeds[0]]["points"]["0"]["questions"])


def section(results: Results, folder: Path) -> str:
    options, panels, lines = results.options, {}, []
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
    what = _WHAT.format(questions=options.analysed)
    return "\n".join([what, "", *lines, results.missing(jobs(options))])


_WHAT = (
    "Gaussian noise on the features before the connector, on the first {questions} held-out questions, with the models "
    "of the table above. The features of different models have different spread, so sigma is given in units of their "
    "own standard deviation; the paper's absolute 3 has a column of its own. Cosine distances are of visual tokens "
    "with noise to those without, at sigma 1 and at the paper's 3: as the paper has it; less the mean text embedding; "
    "and less the connector's own mean visual token. The first two flatter a connector whose tokens all lie near one "
    "vector, as ALIGN's do: what they share hides what changes. The last does not."
)
_DISTANCES = {
    "cosine_distance": "cosine distance",
    "centred_cosine_distance": "less mean text embedding",
    "token_centred_cosine_distance": "less mean visual token",
}
_HEADER = (
    "| connector | without noise | lost at sigma 1 | lost at the paper's 3 | 3 is, in deviations | "
    f"{' | '.join(_DISTANCES.values())} |"
)
_RULE = "|---|---|---|---|---:|---:|---:|---:|"


def _row(results: Results, connector: str, encoder: str, runs: dict[int, Result], clean: Estimate) -> str:
    def distance(name: str) -> str:
        means = (np.mean([run["points"][point][name] for run in runs.values()]) for point in ("1", "paper"))
        return ", ".join(f"{mean:.3f}" for mean in means)

    cells = [
        str(clean),
        _drop(results, connector, encoder, "1"),
        _drop(results, connector, encoder, "paper"),
        f"{PAPER_SIGMA / np.mean([run['feature_deviation'] for run in runs.values()]):.2f}",
        *map(distance, _DISTANCES),
    ]
    return f"| {TITLES[connector]} | {' | '.join(str(cell) for cell in cells)} |"


def claims(results: Results) -> list[str]:
    lines = []
    for encoder in results.options.encoders:
        saved = _drop(results, "align", encoder, f"{_CLAIM:g}", against="mlp")
        if saved is not None:
            lines.append(
                f"{verdict(saved)}: noise as large as the features' own deviation costs ALIGN less than MLP, "
                f"{ENCODER_TITLES[encoder]}: by {saved.signed()} of the questions."
            )
    return lines


PART = Part("noise", "Noise on the features", jobs, run, section, claims)
