"""Fake results in the format of the jobs, in which each connector has a given share of right answers."""

import zlib
from pathlib import Path

import numpy as np

from alignvlm_jax.analysis.rare_names.kinds import NameAnswer
from alignvlm_jax.data.synthetic.names import draw_lexicon
from alignvlm_jax.reproduce import parts
from alignvlm_jax.reproduce.jobs import COMPLETE, RESULT_FILE, Job
from alignvlm_jax.reproduce.options import Options, write_json
from alignvlm_jax.reproduce.parts import names, noise, restoration, vocabulary

PAGES = [3, 4] * 20


def write_results(options: Options, out: Path, rates: dict[str, float], only: tuple[str, ...] = ()) -> list[Job]:
    """Writes a result for every job; `rates` are the shares of right answers by connector, for all kinds of jobs."""
    jobs = parts.all_jobs(options, only)
    for job in jobs:
        write_result(out, job, rates[job.connector])
    return jobs


def write_result(out: Path, job: Job, rate: float, status: str = COMPLETE) -> None:
    """Writes the result of a job with this share of right answers."""
    rng = np.random.default_rng(zlib.crc32(job.name.encode()))
    trained = {
        "steps": 350,
        "train_seconds": 170.0,
        "curve": [[175, 2.0 - rate], [350, 1.0 - rate]],
        "validation_loss": 1.0 - rate + abs(np.log(job["factor"]) if job.part == "tuning" else 0.0),
        "parameters": {"vision": 10, "connector": 5, "language": 10},
    }
    result = {
        "job": job.name,
        "status": status,
        "minutes": 3.0,
        **({} if job.part in ("noise", "vocabulary", "cost") else trained),
        "found": _names(rng, rate, job.seed) if job.part == "names" else _FOUND[job.part](rng, rate),
        "versions": {"git": "abc"},
        "cores": 2,
    }
    write_json(result, job.folder(out) / RESULT_FILE)


def score(rng: np.random.Generator, rate: float) -> dict:
    """Returns the scores of an evaluation with this share of right answers."""
    right = rng.random(sum(PAGES)) < rate
    return {
        "exact_match": round(float(right.mean()), 4),
        "anls": rate,
        "unseen_font": rate,
        "right": "".join("01"[int(value)] for value in right),
        "questions": PAGES,
    }


def _accuracy(rng, rate):
    return {"factor": 1.0, "heldout": score(rng, rate), "blank": score(rng, 0.0), "wrong": score(rng, 0.01)}


def _noise(rng, rate):
    names = ["0", *(f"{share:g}" for share in noise.RELATIVE_SIGMAS), "paper"]
    distances = {"cosine_distance": 0.1, "centred_cosine_distance": 0.2, "token_centred_cosine_distance": 0.3}
    # The worse a connector is, the more it loses.
    points = {name: {**score(rng, rate if name == "0" else rate**2), **distances} for name in names}
    return {"feature_deviation": 1.5, "points": points}


def _vocabulary(rng, rate):
    names = [*(f"{share:g}" for share in vocabulary.SHARES), "1"]
    points = {name: {"words": int(512 * float(name)), "mass": 0.99, **score(rng, rate)} for name in names}
    return {
        "points": points,
        "words_carrying": {"0.9": 30, "0.99": 60, "0.999": 80},
        "largest_probability": 0.4,
        "effective_words": 20.0,
    }


def _restoration(rng, rate):
    def fake_scores(share):
        exact = rng.random(sum(PAGES)) < share
        return {
            "exact": "".join("01"[int(value)] for value in exact),
            "jaccards": exact.astype(float).tolist(),
            "questions": PAGES,
        }

    names = restoration.DIFFICULTIES
    return {name: fake_scores(rate) for name in names} | {
        restoration.BEFORE + name: fake_scores(rate / 2) for name in names
    }


def _names(rng, rate, seed):
    """Returns answers whose errors are garble at the same rate for every name; the decoder alone is always right."""
    lexicon = draw_lexicon(seed, names.GROUPS)
    wrong = rng.random(len(lexicon) * 4) >= rate
    answers = [
        NameAnswer("", name, "XX" if is_wrong else name.text, "garble" if is_wrong else "right")
        for name, is_wrong in zip(lexicon * 4, wrong, strict=True)
    ]
    spelled = [NameAnswer("", name, name.text, "right") for name in lexicon]
    packed = {"answers": names.pack(answers), "spelled": names.pack(spelled)}
    return {"factor": 1.0, **packed, "documents": score(rng, rate)}


def _cost(rng, rate):
    return {
        "parameters": {"connector": 5},
        "visual_tokens_per_page": 200,
        "seconds_per_step": 0.5,
        "step_memory_mb": 100.0,
        "answer_seconds": 2.0,
    }


_FOUND = {
    "tuning": lambda rng, rate: {},
    "accuracy": _accuracy,
    "noise": _noise,
    "vocabulary": _vocabulary,
    "low_resource": lambda rng, rate: {"heldout": score(rng, rate)},
    "restoration": _restoration,
    "cost": _cost,
}
