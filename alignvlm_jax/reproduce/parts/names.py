"""Rare names: whether ALIGN and MLP read them as more common ones, and what helps.

Every run follows the recipe from the backbones on, but on a mixture of pages of names and ordinary documents. Each page
of names occurs once. The names and their rarity are drawn again for each seed, so different seeds have different names.
One option is compared: several views of each page, with which the trained models are asked again. Another option, words
of ALIGN's own, has been removed: its existing results are still reported, but it is not run again.
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
_MAX_SHARE = 0.6  # of the pages; in the recipe's 2,400 pages all pages of names fit


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
      connector: the connector.
      words: number of ALIGN's own words besides the vocabulary; a closed experiment (docs/rare_names.md).
      views: number of views of each page. With several views, the variant uses the model of the variant with one view.
    """

    connector: str
    words: int = 0
    views: int = 1

    @property
    def title(self) -> str:
        """Name in tables and plots."""
        title = TITLES[self.connector]
        if self.words:
            title += f" with {self.words} words of its own"
        return f"{title}, {self.views} views" if self.views > 1 else title


# In the order of the table. A variant with several views comes after the one whose model it uses.
_ALIGN, _WORDS, _ALIGN_VIEWS = Variant("align"), Variant("align", words=128), Variant("align", views=VIEWS)
_MLP, _MLP_VIEWS = Variant("mlp"), Variant("mlp", views=VIEWS)
_VARIANTS = (_ALIGN, _WORDS, _ALIGN_VIEWS, _MLP, _MLP_VIEWS)
_COMPARED = ((_WORDS, _ALIGN), (_ALIGN_VIEWS, _ALIGN), (_MLP, _ALIGN), (_MLP_VIEWS, _MLP))


def dataset(seed: int) -> str:
    """Returns the name of the data set of a seed."""
    return f"{FAMILY}-{seed}"


def build(data: Path, seeds: int) -> None:
    """Draws a corpus for each seed."""
    for seed in range(seeds):
        build_names_corpus(data / dataset(seed), seed=seed, groups=GROUPS)


def job(variant: Variant, encoder: str, seed: int) -> Job:
    """Returns the run of a variant."""
    connector, words, views = variant
    base = Job(
        "names",
        encoder,
        connector,
        seed,
        variant=f"words{words}" if words else "",
        setting=(("variant", variant),),
        needs=tuple(trial.name for trial in tuning.trials(connector, encoder)),
        wave=seed,
        weight=1.3,
    )
    if views == 1:
        return base
    needs = (job(variant._replace(views=1), encoder, seed).name,)
    return dataclasses.replace(base, variant=f"views{views}", needs=needs, needs_weights=True, weight=1.0)


def jobs(options: Options) -> list[Job]:
    """Returns the runs on the first encoder: the fair one, if it is among the options."""
    return [job for job in _all_jobs(options) if not job["variant"].words]


def closed_jobs(options: Options) -> list[Job]:
    """Returns the runs with words of ALIGN's own, an option that has been removed."""
    return [job for job in _all_jobs(options) if job["variant"].words]


def _all_jobs(options: Options) -> list[Job]:
    chosen = [variant for variant in _VARIANTS if variant.connector in recipe.connectors(options)]
    return [job(variant, options.encoders[0], seed) for seed in range(options.seeds) for variant in chosen]


def run(work: Work) -> dict[str, Any]:
    """Trains, unless the variant uses the model of another, and asks for names and about documents."""
    variant, folder, limit = work.job["variant"], work.data / dataset(work.job.seed), work.options.questions
    if variant.views > 1:
        single_view = job(variant._replace(views=1), work.job.encoder, work.job.seed)
        reader = work.reader(single_view).with_views(variant.views)
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
    """Returns the recipe with names mixed in, so that each page of names occurs once."""
    # Each page of names should occur once; the documents keep at least 40 % of the pages.
    pages, names = recipe.pages_seen(config.stages), num_documents("train", GROUPS)
    share, start, stages = min(names / pages, _MAX_SHARE), 0, []
    for stage in config.stages:
        # Every stage gets its own slice of the names; the last one gets the remainder.
        stop = start + round(share * recipe.pages_seen((stage,)))
        (documents,) = stage.mixture
        stop = min(stop, names) if stage is not config.stages[-1] else names
        slice_of_names = MixturePart(dataset(seed), f"train[{start}:{stop}]", documents.task, share)
        mixture = (dataclasses.replace(documents, weight=1 - share), slice_of_names)
        stages.append(dataclasses.replace(stage, mixture=mixture))
        start = stop
    return dataclasses.replace(config, stages=tuple(stages))


def pack(answers: Sequence[NameAnswer]) -> list[str]:
    """Returns a line per answer: the name, the answer, its kind, and the letter nearest to the visual tokens."""
    return ["\t".join([a.name.text, " ".join(a.predicted.split()), a.kind, a.letter or ""]) for a in answers]


def unpack(lines: Sequence[str], seed: int) -> list[NameAnswer]:
    """Returns the answers from the lines of `pack`. Group numbers are unique over seeds, whose names differ."""
    lexicon, answers = draw_lexicon(seed, GROUPS), []
    names, endings = {name.text: name for name in lexicon}, count_endings(lexicon)
    for line in lines:
        text, predicted, kind, letter = line.split("\t")
        if kind == "garble":  # Older results do not distinguish the kinds of endings.
            kind = classify_ending(names[text], predicted, endings)
        name = dataclasses.replace(names[text], group=names[text].group + seed * GROUPS)
        answers.append(NameAnswer("", name, predicted, kind, letter or None))
    return answers


def _runs(results: Results, variant: Variant) -> dict[int, Result]:
    encoder = results.options.encoders[0]
    runs = results.by_seed(lambda seed: job(variant, encoder, seed))
    return {seed: result["found"] for seed, result in runs.items()}


def _answers(runs: dict[int, Result], key: str = "answers") -> list[NameAnswer]:
    return [answer for seed, found in runs.items() for answer in unpack(found[key], seed)]


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report and writes its plot."""
    options, lines, curves = results.options, [], {"with look-alikes": {}, "without look-alikes": {}}
    # A row of the table and a curve in each panel for every variant that has results.
    for variant in _VARIANTS:
        runs = _runs(results, variant)
        if not runs:
            continue
        summary = summarize(_answers(runs))
        lines.append(f"| {variant.title} | {' | '.join(_cells(variant, runs, summary))} |")
        for panel, subset in zip(curves, ("look-alikes", "loners"), strict=True):
            rows = summary[subset]["by_count"]
            values = [_estimate(row["error"], len(runs), row["questions"]) for row in rows]
            curves[panel][variant.title] = [_position(count) for count in COUNTS], values
    closed = " (with words of its own, the factor of ALIGN)" if _runs(results, _WORDS) else ""
    introduction = _INTRODUCTION.format(encoder=ENCODER_TITLES[options.encoders[0]], views=VIEWS, closed=closed)
    parts = [introduction, "", *_HEADER, *lines, ""]
    if lines:
        plots.curves(
            folder / "names.svg",
            curves,
            "training pages that print the name (0 drawn at 1/4)",
            "names answered wrong",
            logarithmic=(True, False),
        )
        parts += ["![Error on names by the number of training pages that print them](names.svg)", ""]
    parts += [f"- {line}" for line in _differences(results)]
    return "\n".join([*parts, "", results.missing(jobs(options))])


_INTRODUCTION = (
    "The paper's stated failure: rare names are read as more common ones. Names of at most six letters are each "
    "printed on 0, 1, 4, 16, 64 or 256 training pages, at random. Half of them have look-alikes one letter apart. "
    "Held-out pages ask for all names equally often.\n\nAll runs start from the backbones, on the {encoder}. They "
    "take the recipe's steps on names and documents mixed, with the learning rate chosen for the connector in the "
    "main table{closed}.\n\n"
    "- *{views} views*: the same models, with {views} views of each page, shifted by parts of a patch, for {views} "
    "times the work.\n"
    "- *Rare*: error on names seen at most once. *Common*: error on names seen 64 times or more. *Gap*: the "
    "difference.\n"
    "- *Taken for*: names taken for a more common look-alike : for a rarer one.\n"
    "- *Ends like*: answers that are not names, but end like a more common name : like a rarer one; then the share "
    "of the former, 1/2 if rarity did not matter.\n"
    "- *Decoder alone*: error with the letters themselves in place of the visual tokens.\n"
    "- *Letter of the tokens*: how often the visual tokens are nearest to the true one of the letters that distinguish "
    "look-alikes, in all answers and in those pulled to a more common name.\n"
    "- Intervals are 95 %, from a bootstrap over groups of names. They do not cover other differences between seeds."
)
_HEADER = (
    "| connector | names wrong | rare | common | gap | taken for | ends like | decoder alone | letter of the tokens "
    "| documents right | seeds |",
    "|---|---|---|---|---|---:|---|---|---|---|---:|",
)


def _cells(variant: Variant, runs: dict[int, Result], summary: dict[str, Any]) -> list[str]:
    """Returns the cells of a row of the table."""
    overall, pull = summary["all"], summary["look-alikes"]["pull"]
    endings = overall["pull_of_endings"]
    rare, common = (_errors_on(_answers(runs), counts) for counts in (RARE, COMMON))
    pulls = [f"{kind['commoner']} : {kind['rarer']}" for kind in (pull, endings)]
    right = estimate(
        np.array([digits(found["documents"]) for found in runs.values()]),
        next(iter(runs.values()))["documents"]["questions"],
    )
    # A model that is asked with several views is the trained model of the variant with one view.
    if variant.views == 1:
        decoder, letters = _number(summarize(_answers(runs, "spelled"))["all"]["error"]), _letters(runs)
    else:
        decoder = letters = "as with one"
    return [
        _number(overall["error"]),
        rare,
        common,
        _number(overall["rarity_gap"], "+"),
        pulls[0],
        f"{pulls[1]}; {_number(endings)}",
        decoder,
        letters,
        str(right),
        str(len(runs)),
    ]


def _differences(results: Results) -> list[str]:
    """Returns a line for each pair of `_COMPARED`, over the seeds that both variants have."""
    lines = []
    for variant, reference in _COMPARED:
        seeds, first, other = _paired(results, reference, variant)
        if not seeds:
            continue
        # `compare` and the documents both give the variant minus its reference.
        found = compare(*(_answers(runs) for runs in (first, other)))
        right = np.array([[digits(runs[seed]["documents"]) for seed in seeds] for runs in (other, first)])
        documents = estimate(right[0] - right[1], first[seeds[0]]["documents"]["questions"])
        lines.append(
            f"{variant.title} minus {reference.title}: names wrong {_number(found['error'], '+')}, rare "
            f"{_number(found['error_on_rare'], '+')}, common {_number(found['error_on_common'], '+')}, gap "
            f"{_number(found['rarity_gap'], '+')}; documents right {documents.signed()}."
        )
    return lines


def claims(results: Results) -> list[str]:
    """Returns the claims about rare names and the options against their errors."""
    lines, align = [], _runs(results, _ALIGN)
    if align:
        overall = summarize(_answers(align))["all"]
        gap = _estimate(overall["rarity_gap"], len(align), overall["questions"])
        lines.append(f"{verdict(gap)}: ALIGN's error is larger on rare names than on common ones: {gap.signed()}.")
    options = {
        _WORDS: "words of its own (not in the paper) lower ALIGN's error on rare names",
        _ALIGN_VIEWS: f"{VIEWS} views of each page (not in the paper) lower ALIGN's error on rare names",
    }
    for variant, claim in options.items():
        seeds, baseline, other = _paired(results, _ALIGN, variant)
        if seeds:
            answers = _answers(other), _answers(baseline)
            reduction = _estimate(compare(*answers)["error_on_rare"], len(seeds), len(answers[0]))
            lines.append(f"{verdict(reduction)}: {claim}: {reduction.signed()}.")
    return lines


def _paired(
    results: Results, first: Variant, second: Variant
) -> tuple[list[int], dict[int, Result], dict[int, Result]]:
    """Returns the seeds that both variants have, and the runs of each with these seeds."""
    both = _runs(results, first), _runs(results, second)
    seeds = sorted(both[0].keys() & both[1].keys())
    return seeds, *({seed: runs[seed] for seed in seeds} for runs in both)


def _errors_on(answers: Sequence[NameAnswer], counts: Sequence[int]) -> str:
    return _number(summarize([answer for answer in answers if answer.name.seen in counts])["all"]["error"])


def _letters(runs: dict[int, Result]) -> str:
    """Returns the share of answers, and of pulled answers, whose visual tokens are nearest to the true letter."""
    agreements = []
    for seed, found in runs.items():
        letters = distinguishing_letters(draw_lexicon(seed, GROUPS))
        for answer in unpack(found["answers"], seed):
            if answer.letter is not None:
                position, _ = letters[answer.name.group - seed * GROUPS]
                is_true = answer.letter == answer.name.text[position]
                agreements.append((is_true, answer.kind == "commoner look-alike"))
    pulled = [is_true for is_true, is_pulled in agreements if is_pulled]
    overall = f"{np.mean([is_true for is_true, _ in agreements]):.3f}" if agreements else ""
    return f"{overall}; {np.mean(pulled):.2f} of {len(pulled)}" if pulled else overall


def _position(count: int) -> float:
    """Returns the position of a count on the logarithmic axis, which has no 0."""
    return count or 0.25


def _estimate(found: dict[str, float | None], seeds: int, questions: int) -> Estimate:
    value, low, high = (np.nan if found[key] is None else found[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, seeds, questions)


def _number(found: dict[str, Any], sign: str = "") -> str:
    if found["value"] is None:
        return ""
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


PART = Part("names", "Rare names", jobs, run, section, claims, closed_jobs)
