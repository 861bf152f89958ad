"""Rare names: are they pulled to commoner ones, does MLP do the same, and what helps?

Every run is one of the recipe's, from the backbones on, but on pages of names and ordinary documents mixed; every page
of names comes once. Which name is common is drawn by lot anew for each seed, so the seeds' names are different names.
One option is compared: several looks at each page, which the trained models are asked with once more. Another, words
of ALIGN's own, has been removed: its results, where there are some, are still reported, and no new ones are made.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignvlm_jax.analysis.rare_names.answers import ask_decoder, ask_names, read_letters
from alignvlm_jax.analysis.rare_names.kinds import (
    NameAnswer,
    classify_ending,
    count_endings,
    distinguishing_letters,
)
from alignvlm_jax.analysis.rare_names.measure import COMMON, RARE, compare, summarize
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data.synthetic.names import COUNTS, FAMILY, build_names_corpus, draw_lexicon, num_documents
from alignvlm_jax.reproduce import plots, recipe
from alignvlm_jax.reproduce.jobs import Job, Result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.parts import tuning
from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict
from alignvlm_jax.reproduce.work import Work, digits

VIEWS = 4
GROUPS = 12
_LARGEST_SHARE = 0.6  # of the pages; with the recipe's 2,400 all of the names' fit


class Variant(NamedTuple):
    """Who is asked.

    connector: which.
    words: of its own, beside the vocabulary; an experiment that is closed (docs/rare_names.md).
    views: how often each page is looked at; beyond once, the model is that of the variant that looks once.
    """

    connector: str
    words: int = 0
    views: int = 1

    @property
    def title(self) -> str:
        title = TITLES[self.connector]
        if self.words:
            title += f" with {self.words} words of its own"
        return f"{title}, {self.views} views" if self.views > 1 else title


# In the order of the table, each after the one whose model it asks.
_ALIGN, _WORDS, _LOOKS = Variant("align"), Variant("align", words=128), Variant("align", views=VIEWS)
_MLP, _MLP_LOOKS = Variant("mlp"), Variant("mlp", views=VIEWS)
_VARIANTS = (_ALIGN, _WORDS, _LOOKS, _MLP, _MLP_LOOKS)
_COMPARED = ((_WORDS, _ALIGN), (_LOOKS, _ALIGN), (_MLP, _ALIGN), (_MLP_LOOKS, _MLP))


def dataset(seed: int) -> str:
    return f"{FAMILY}-{seed}"


def build(data: Path, seeds: int) -> None:
    """Draws a corpus for each seed."""
    for seed in range(seeds):
        build_names_corpus(data / dataset(seed), seed=seed, groups=GROUPS)


def job(variant: Variant, encoder: str, seed: int) -> Job:
    connector, words, views = variant
    base = Job(
        "names",
        encoder,
        connector,
        seed,
        variant=f"words{words}" if words else "",
        setting=(("asked", variant),),
        needs=tuple(trial.name for trial in tuning.trials(connector, encoder)),
        wave=seed,
        weight=1.3,
    )
    if views == 1:
        return base
    needs = (job(variant._replace(views=1), encoder, seed).name,)
    return dataclasses.replace(base, variant=f"views{views}", needs=needs, needs_weights=True, weight=1.0)


def jobs(options: Options) -> list[Job]:
    """On the first encoder alone: the fair one, if it is asked for."""
    return [job for job in _all_jobs(options) if not job["asked"].words]


def closed_jobs(options: Options) -> list[Job]:
    """The jobs with words of ALIGN's own, an option that has been removed."""
    return [job for job in _all_jobs(options) if job["asked"].words]


def _all_jobs(options: Options) -> list[Job]:
    chosen = [variant for variant in _VARIANTS if variant.connector in recipe.connectors(options)]
    return [job(variant, options.encoders[0], seed) for seed in range(options.seeds) for variant in chosen]


def run(work: Work) -> dict[str, Any]:
    variant, folder, limit = work.job["asked"], work.data / dataset(work.job.seed), work.options.questions
    if variant.views > 1:
        once = job(variant._replace(views=1), work.job.encoder, work.job.seed)
        reader = work.reader(once).with_views(variant.views)
        return {
            "answers": pack(ask_names(reader, folder, limit=limit)),
            "documents": work.score(reader, work.records("heldout"), limit),
        }
    factor = tuning.chosen_factor(work.out, work.job.connector, work.job.encoder)
    work.train(mixed(work.experiment(factor=factor), work.job.seed))
    reader = work.reader()
    answers = ask_names(reader, folder, limit=limit)
    answers = read_letters(reader, folder, answers)
    spelled = ask_decoder(reader, folder, limit=limit)
    return {
        "factor": factor,
        "answers": pack(answers),
        "spelled": pack(spelled),
        "documents": work.score(reader, work.records("heldout"), limit),
    }


def mixed(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The recipe with names mixed in, each page of them once."""
    pages, names = recipe.pages_seen(config.stages), num_documents("train", GROUPS)
    share, start, stages = min(names / pages, _LARGEST_SHARE), 0, []
    for stage in config.stages:
        stop = start + round(share * recipe.pages_seen((stage,)))
        (ordinary,) = stage.mixture
        stop = min(stop, names) if stage is not config.stages[-1] else names
        some = MixturePart(dataset(seed), f"train[{start}:{stop}]", ordinary.task, share)
        stages.append(dataclasses.replace(stage, mixture=(dataclasses.replace(ordinary, weight=1 - share), some)))
        start = stop
    return dataclasses.replace(config, stages=tuple(stages))


def pack(answers: Sequence[NameAnswer]) -> list[str]:
    """A line an answer: the name, what was answered, its kind, and the letter that the visual tokens said."""
    return ["\t".join([a.name.text, " ".join(a.predicted.split()), a.kind, a.letter or ""]) for a in answers]


def unpack(lines: Sequence[str], seed: int) -> list[NameAnswer]:
    """The answers; groups get numbers of their seed's, since another seed's are other names."""
    lexicon, answers = draw_lexicon(seed, GROUPS), []
    names, endings = {name.text: name for name in lexicon}, count_endings(lexicon)
    for line in lines:
        text, predicted, kind, letter = line.split("\t")
        if kind == "garble":  # runs from before endings were told apart
            kind = classify_ending(names[text], predicted, endings)
        name = dataclasses.replace(names[text], group=names[text].group + seed * GROUPS)
        answers.append(NameAnswer("", name, predicted, kind, letter or None))
    return answers


def _runs(results: Results, variant: Variant) -> dict[int, Result]:
    encoder = results.options.encoders[0]
    seeds = {job(variant, encoder, seed): seed for seed in range(results.options.seeds)}
    return {seeds[one]: result["found"] for one, result in results.complete(list(seeds)).items()}


def _answers(runs: dict[int, Result], which: str = "answers") -> list[NameAnswer]:
    return [answer for seed, found in runs.items() for answer in unpack(found[which], seed)]


def section(results: Results, folder: Path) -> str:
    options, lines, curves = results.options, [], {"with look-alikes": {}, "like no other name": {}}
    for variant in _VARIANTS:
        runs = _runs(results, variant)
        if not runs:
            continue
        summary = summarize(_answers(runs))
        rare, common = (_errors_on(_answers(runs), counts) for counts in (RARE, COMMON))
        trained = variant.views == 1
        alone = _number(summarize(_answers(runs, "spelled"))["all"]["error"]) if trained else "as with one"
        right = estimate(
            np.array([digits(found["documents"]) for found in runs.values()]),
            next(iter(runs.values()))["documents"]["questions"],
        )
        whole, pull = summary["all"], summary["look-alikes"]["pull"]
        endings = whole["pull_of_endings"]
        pulls = [f"{kind['commoner']} : {kind['rarer']}" for kind in (pull, endings)]
        cells = [_number(whole["error"]), rare, common, _number(whole["rarity_gap"], "+")]
        cells += [pulls[0], f"{pulls[1]}; {_number(endings)}"]
        cells += [alone, _letters(runs) if trained else "as with one", str(right), str(len(runs))]
        lines.append(f"| {variant.title} | {' | '.join(cells)} |")
        for panel, which in zip(curves, ("look-alikes", "loners"), strict=True):
            rows = summary[which]["by_count"]
            values = [_estimate(row["error"], len(runs), row["questions"]) for row in rows]
            curves[panel][variant.title] = [_place(count) for count in COUNTS], values
    closed = " (with words of its own: as for ALIGN)" if _runs(results, _WORDS) else ""
    what = _WHAT.format(encoder=ENCODER_TITLES[options.encoders[0]], views=VIEWS, closed=closed)
    parts = [what, "", *_HEADER, *lines, ""]
    if lines:
        plots.curves(
            folder / "names.svg",
            curves,
            "training pages that print the name (0 drawn at 1/4)",
            "names answered wrong",
            logarithmic=(True, False),
        )
        parts += ["![Error on names by how many training pages print them](names.svg)", ""]
    parts += [f"- {line}" for line in _differences(results)]
    return "\n".join([*parts, "", results.missing(jobs(options))])


_WHAT = (
    "The paper's stated failure: rare names are pulled to commoner ones. Names of six letters or fewer, each printed "
    "on 0, 1, 4, 16, 64 or 256 training pages by lot, half of them with look-alikes one letter apart; held-out pages "
    "ask for all equally often. From the backbones on, on the {encoder}, the recipe's steps on names and documents "
    "mixed, the rate as tuned for the connector in the main table{closed}. *{views} "
    "views*: the same models, each page looked at {views} times, moved by parts of a patch, in {views} times the work. "
    "*Rare*: at most once, *common*: 64 times and more. *Taken for*: a name taken for a commoner look-alike : for a "
    "rarer one. *Ends like*: an answer that is no name, but ends as a commoner name does : as a rarer one; and the "
    "share of the former, a half if rarity did not matter. *Decoder alone*: error with the letters themselves in the "
    "place of the visual tokens. *Letter said*: how often the visual tokens are nearest to the true one of the letters "
    "that tell look-alikes apart, in all answers and in those pulled to a commoner name. Intervals: 95 %, a bootstrap "
    "over groups of names (it does not count what else differs between seeds)."
)
_HEADER = (
    "| connector | names wrong | rare | common | gap | taken for | ends like | decoder alone | letter said "
    "| documents right | seeds |",
    "|---|---|---|---|---|---:|---|---|---|---|---:|",
)


def _differences(results: Results) -> list[str]:
    """Variants against each other, over the seeds that both have."""
    lines = []
    for variant, reference in _COMPARED:
        seeds, first, other = _paired(results, reference, variant)
        if not seeds:
            continue
        found = compare(*(_answers(runs) for runs in (first, other)))
        right = np.array([[digits(runs[seed]["documents"]) for seed in seeds] for runs in (other, first)])
        documents = estimate(right[0] - right[1], first[seeds[0]]["documents"]["questions"])
        lines.append(
            f"{variant.title} less {reference.title}: names wrong {_number(found['error'], '+')}, rare "
            f"{_number(found['error_on_rare'], '+')}, common {_number(found['error_on_common'], '+')}, gap "
            f"{_number(found['rarity_gap'], '+')}; documents right {documents.signed()}."
        )
    return lines


def claims(results: Results) -> list[str]:
    lines, align = [], _runs(results, _ALIGN)
    if align:
        whole = summarize(_answers(align))["all"]
        gap = _estimate(whole["rarity_gap"], len(align), whole["questions"])
        lines.append(f"{verdict(gap)}: ALIGN errs more on rare names than on common ones: {gap.signed()} of them.")
    options = {
        _WORDS: "words of its own (not in the paper) lower ALIGN's error on rare names",
        _LOOKS: f"looking at each page {VIEWS} times (not in the paper) lowers ALIGN's error on rare names",
    }
    for variant, what in options.items():
        seeds, once, other = _paired(results, _ALIGN, variant)
        if seeds:
            answers = _answers(other), _answers(once)
            fewer = _estimate(compare(*answers)["error_on_rare"], len(seeds), len(answers[0]))
            lines.append(f"{verdict(fewer)}: {what}: by {fewer.signed()} of them.")
    return lines


def _paired(
    results: Results, first: Variant, second: Variant
) -> tuple[list[int], dict[int, Result], dict[int, Result]]:
    """The seeds that both have, and the runs of both with these."""
    both = _runs(results, first), _runs(results, second)
    seeds = sorted(both[0].keys() & both[1].keys())
    return seeds, *({seed: runs[seed] for seed in seeds} for runs in both)


def _errors_on(answers: Sequence[NameAnswer], counts: Sequence[int]) -> str:
    return _number(summarize([answer for answer in answers if answer.name.seen in counts])["all"]["error"])


def _letters(runs: dict[int, Result]) -> str:
    """The share of answers, and of pulled ones, at which the visual tokens said the true letter."""
    said = []
    for seed, found in runs.items():
        letters = distinguishing_letters(draw_lexicon(seed, GROUPS))
        for answer in unpack(found["answers"], seed):
            if answer.letter is not None:
                place, _ = letters[answer.name.group - seed * GROUPS]
                said.append((answer.letter == answer.name.text[place], answer.kind == "commoner look-alike"))
    pulled = [true for true, is_pulled in said if is_pulled]
    whole = f"{np.mean([true for true, _ in said]):.3f}" if said else ""
    return f"{whole}; {np.mean(pulled):.2f} of {len(pulled)}" if pulled else whole


def _place(count: int) -> float:
    return count or 0.25


def _estimate(found: dict[str, float | None], seeds: int, questions: int) -> Estimate:
    value, low, high = (np.nan if found[key] is None else found[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, seeds, questions)


def _number(found: dict[str, Any], sign: str = "") -> str:
    if found["value"] is None:
        return ""
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


PART = Part("names", "Rare names", jobs, run, section, claims, closed_jobs)
