"""ALIGN with fewer words: the score by the number of the decoder's words that its connector keeps."""

from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.analysis.vocabulary.measure import mean_distribution, pruned_reader
from alignvlm_jax.reproduce import plots
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import ENCODER_TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import accuracy
from alignvlm_jax.reproduce.statistics import estimate
from alignvlm_jax.reproduce.work import Work, digits

# From a sixteenth of the nano decoder's 512 words up; the pages print 69 different characters.
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 1 / 2)
_MASSES = (0.9, 0.99, 0.999)
_PAGES = 100


def jobs(options: Options) -> list[Job]:
    """Returns the measurements on ALIGN's trained models of the main table."""
    return [
        Job(
            "vocabulary",
            encoder,
            "align",
            seed,
            needs=(accuracy.job("align", encoder, seed).name,),
            needs_weights=True,
            wave=seed,
            weight=0.4,
        )
        for seed in range(options.seeds)
        for encoder in options.encoders
        if "align" in options.connectors
    ]


def run(work: Work) -> dict[str, Any]:
    """Counts the words on validation pages and scores the pruned models on held-out ones."""
    reader = work.reader(accuracy.job("align", work.job.encoder, work.job.seed))
    # Counting words on the pages that are scored would favor the pruned models.
    usage = mean_distribution(reader, work.records("validation"), pages=_PAGES)
    kept = np.cumsum(np.sort(usage)[::-1])
    records, size = work.records("heldout"), len(usage)
    points = {"1": {"words": size, **work.score(reader, records, work.options.analysed)}}
    for share in SHARES:
        words = max(1, round(share * size))
        pruned = pruned_reader(reader, usage, words)
        points[f"{share:g}"] = {
            "words": words,
            "mass": round(float(kept[words - 1]), 6),
            **work.score(pruned, records, work.options.analysed, title=f"{words} words"),
        }
    return {
        "points": points,
        "words_carrying": {f"{mass:g}": int(np.searchsorted(kept, mass) + 1) for mass in _MASSES},
        "largest_probability": round(float(usage.max()), 5),
        "effective_words": round(float(np.exp(-np.sum(usage * np.log(np.maximum(usage, 1e-30))))), 2),
    }


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report and writes its plot."""
    options, curves, lines = results.options, {}, []
    # A table and a curve for each encoder, over the shares in ascending order and the whole vocabulary.
    for encoder in options.encoders:
        encoder_jobs = [job for job in jobs(options) if job.encoder == encoder]
        runs = [result["found"] for result in results.complete(encoder_jobs).values()]
        if not runs:
            continue
        names = [*(f"{share:g}" for share in SHARES), "1"]
        values = [
            estimate(np.array([digits(run["points"][name]) for run in runs]), runs[0]["points"][name]["questions"])
            for name in names
        ]
        words = [runs[0]["points"][name]["words"] for name in names]
        curves[ENCODER_TITLES[encoder]] = {"ALIGN": (words, values)}
        lines += [f"### {ENCODER_TITLES[encoder].capitalize()}", "", "| words kept | mass kept | exact match | loss |"]
        lines.append("|---:|---:|---|---|")
        for name, number, value in zip(names, words, values, strict=True):
            mass = np.mean([run["points"][name].get("mass", 1.0) for run in runs])
            # The loss is paired by question with the score of the whole vocabulary, which lowers its variance.
            loss = estimate(
                np.array([digits(run["points"]["1"]) - digits(run["points"][name]) for run in runs]),
                runs[0]["points"][name]["questions"],
            )
            lines.append(f"| {number} | {mass:.4f} | {value} | {loss.signed() if name != '1' else ''} |")
        carrying = ", ".join(
            f"{np.mean([run['words_carrying'][f'{mass:g}'] for run in runs]):.0f} words carry {mass:.1%}"
            for mass in _MASSES
        )
        largest = np.mean([run["largest_probability"] for run in runs])
        lines += ["", f"Of the mass of the mean distribution, {carrying}. The most common word has {largest:.3f}.", ""]
    if curves:
        plots.curves(
            folder / "vocabulary.svg",
            curves,
            "words that ALIGN keeps",
            "questions answered right",
            logarithmic=(True, False),
        )
        lines += ["![Share of questions answered right by ALIGN with fewer words](vocabulary.svg)", ""]
    introduction = (
        "ALIGN's connector pruned to its most used words after training, without further training. Usage is the mean "
        f"of P over {_PAGES} validation pages; the score is that of the first {options.analysed} held-out "
        "questions.\n\nIn the paper, 3.4K of 128K words carry the mass, and keeping only those costs 0.12 points of "
        "58.81."
    )
    return "\n".join([introduction, "", *lines, results.missing(jobs(options))])


PART = Part("vocabulary", "ALIGN with fewer words", jobs, run, section)
