"""Are rare names pulled to commoner ones, and by whom? Measured on the corpus of `data/synthetic/names.py`.

Names of different rarity differ there by lot alone, so what differs between the answers is due to rarity:

    error against rarity    share of wrong answers by how many training pages print the name
    rarity gap              error on names seen at most once, less error on those seen 64 times and more
    pull                    of the wrong answers that are another name of the group, the share that is a commoner one.
                            Of names asked equally often it is a half if rarity does not matter
    pull of endings         the same of wrong answers that are no name, but end as another name of the corpus does
    blame                   the same error of the decoder alone, and what the visual tokens said (`name_answers.py`)

Intervals are 95 % percentile intervals of a bootstrap over groups of names: answers about one name are not independent.
Axes: G groups, C counts (rarities), R resamplings.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from jaxtyping import Float, Int

from alignvlm_jax.analysis import name_answers, output
from alignvlm_jax.analysis.name_answers import KINDS, NameAnswer
from alignvlm_jax.analysis.subjects import load_readers
from alignvlm_jax.data.synthetic.names import COUNTS, Name, read_lexicon
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.inference.reader import Reader

RARE, COMMON = COUNTS[:2], COUNTS[-2:]
_IS_RARE, _IS_COMMON, _ANY = (np.isin(COUNTS, counts) for counts in (RARE, COMMON, COUNTS))
_RESAMPLINGS = 2000

Figure = Callable[[Int[np.ndarray, "*R G"]], Float[np.ndarray, "*R"]]
"""From which groups (rows) to a figure, for any number of choices of groups."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where there is nothing to count."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        fields = dataclasses.asdict(self)
        return {name: None if np.isnan(number) else round(number, 4) for name, number in fields.items()}


def summarize(answers: Sequence[NameAnswer], *, seed: int = 0) -> dict[str, Any]:
    """The figures of one model's answers, JSON: over all names, over those with look-alikes, over the loners.

    Args:
      answers: from `name_answers`.
      seed: of the bootstrap.
    """
    which = {"all": (True, False), "look-alikes": (True,), "loners": (False,)}
    return {
        name: _summarize([answer for answer in answers if answer.name.has_look_alikes in kinds], seed)
        for name, kinds in which.items()
    }


def compare(answers: Sequence[NameAnswer], others: Sequence[NameAnswer], *, seed: int = 0) -> dict[str, Any]:
    """How much more `others` err than `answers`, paired by group: on all names, on rare, on common ones, in the gap.

    Raises:
      UserError: the two are not about the same names.
    """
    (wrong, asked), (other_wrong, other_asked) = _count(answers, _is_wrong), _count(others, _is_wrong)
    if not np.array_equal(asked > 0, other_asked > 0):
        raise UserError("the answers to compare are about different names: ask both models about the same pages")

    def more(columns) -> Figure:
        ours, theirs = _rate(wrong, asked, columns), _rate(other_wrong, other_asked, columns)
        return lambda rows: theirs(rows) - ours(rows)

    figures = {
        "error": more(_ANY),
        "error_on_rare": more(_IS_RARE),
        "error_on_common": more(_IS_COMMON),
        "rarity_gap": lambda rows: more(_IS_RARE)(rows) - more(_IS_COMMON)(rows),
    }
    return {name: _bootstrap(figure, len(wrong), seed).to_json() for name, figure in figures.items()}


def blame(answers: Sequence[NameAnswer], lexicon: Sequence[Name]) -> dict[str, Any]:
    """How often the visual tokens were nearest to the true letter, by what the model answered and by rarity.

    Args:
      answers: from `name_answers.read_letters`.
      lexicon: of the corpus.
    """
    letters = name_answers.telling_letters(lexicon)
    looked = [answer for answer in answers if answer.letter is not None]
    pulled = [answer for answer in looked if answer.kind == "commoner look-alike"]

    def share(chosen: Sequence[NameAnswer], text: Callable[[NameAnswer], str]) -> dict[str, Any]:
        agree = sum(answer.letter == text(answer)[letters[answer.name.group][0]] for answer in chosen)
        tally = Tally(agree, len(chosen)).to_json()
        return {"share": tally["exact_match"], "interval_95": tally["interval_95"], "answers": len(chosen)}

    def the_name(answer: NameAnswer) -> str:
        return answer.name.text

    return {
        "right": share([answer for answer in looked if answer.kind == "right"], the_name),
        "wrong": share([answer for answer in looked if answer.kind != "right"], the_name),
        "pulled": share(pulled, the_name),
        "pulled, to the letter answered": share(pulled, lambda answer: answer.predicted),
        "by_count": {
            str(count): share([answer for answer in looked if answer.name.seen == count], the_name) for count in COUNTS
        },
    }


def analyze(
    reader: Reader, folder: str | Path, *, split: str = "heldout", limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Everything about one model: its figures, JSON, and with them the answers.

    Of a reader that looks at its images several times only the answers: the rest is a matter of one look.

    Args:
      reader: the model.
      folder: of a names corpus.
      split: which pages.
      limit: ask only the first so many questions.
      seed: of the bootstrap.
    """
    answers = name_answers.ask_names(reader, folder, split=split, limit=limit)
    figures = {"split": split, "model": summarize(answers, seed=seed)}
    if name_answers.has_one_token_a_patch(reader) and reader.num_views == 1:
        answers = name_answers.read_letters(reader, folder, answers)
        figures["tokens say the true letter"] = blame(answers, read_lexicon(folder))
        spelled = name_answers.ask_decoder(reader, folder, split=split, limit=limit)
        figures["decoder alone"] = summarize(spelled, seed=seed)
        figures["spelled_answers"] = [answer.to_json() for answer in spelled]
    return {**figures, "answers": [answer.to_json() for answer in answers]}


def run(
    checkpoints: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    split: str = "heldout",
    limit: int | None = None,
    batch_size: int = 32,
    views: int = 1,
    seed: int = 0,
) -> None:
    """`alignvlm analyze names`: writes names.json, names.png and names.md into `out`.

    Args:
      checkpoints: each is asked; the first is what the others are compared with.
      data: the folder of a names corpus.
      out: where to.
      split: which pages.
      limit: ask only the first so many questions.
      batch_size: questions decoded at once.
      views: above 1, each is asked again, looking at every page so many times (`inference/views.py`).
      seed: of the bootstrap.
    """
    output.check_folder(out)
    read_lexicon(data)  # refused before a model is loaded
    models = {}
    for name, reader in load_readers(checkpoints, batch_size=batch_size):
        for number in sorted({1, views}):
            title = name if number == 1 else f"{name}, {number} views"
            models[title] = analyze(reader.with_views(number), data, split=split, limit=limit, seed=seed)
    text = [f"# Rare names\n\n{split} pages of {data}; intervals are 95 %, over groups of names.\n"]
    text += [f"## {name}\n\n{describe(figures)}\n" for name, figures in models.items()]
    first, *others = models
    answers = {
        name: [NameAnswer.from_json(answer) for answer in figures["answers"]] for name, figures in models.items()
    }
    figures: dict[str, Any] = {"data": str(data), "split": split, "models": models}
    if others:
        found = {name: compare(answers[first], answers[name], seed=seed) for name in others}
        figures[f"compared with {first}"] = found
        text.append(f"## Compared with {first}\n\n{describe_comparison(first, found)}\n")
    lines = {name: found["model"] for name, found in models.items()}
    if not others and "decoder alone" in models[first]:
        lines["its decoder alone"] = models[first]["decoder alone"]
    pictures = {"names": plot(lines)}
    output.write(out, "names", figures=figures, pictures=pictures, text="\n".join(text))


def plot(models: dict[str, dict[str, Any]]) -> matplotlib.figure.Figure:
    """Error against rarity, names with look-alikes on the left, others on the right; a line a model.

    Args:
      models: from a name to what `summarize` says of it.
    """
    figure, axes = output.picture(2, title="Names answered wrong, by how many training pages print them")
    for axis, which in zip(axes, ("look-alikes", "loners"), strict=True):
        for number, (name, summary) in enumerate(models.items()):
            rows = [row for row in summary[which]["by_count"] if row["questions"]]
            x = [COUNTS.index(row["seen"]) + 0.08 * (number - (len(models) - 1) / 2) for row in rows]
            y, low, high = (np.array([100 * row["error"][key] for row in rows]) for key in ("value", "low", "high"))
            bars = np.maximum([y - low, high - y], 0)
            axis.errorbar(x, y, yerr=bars, label=name, capsize=2.5, elinewidth=0.8, **output.line_style(number))
        axis.set_title("with look-alikes" if which == "look-alikes" else "like no other name", fontsize=10)
        axis.set_xticks(range(len(COUNTS)), COUNTS)
        axis.set_xlabel("training pages that print the name")
        axis.set_ylabel("wrong answers (%), 95 % interval")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure


def describe_comparison(first: str, found: dict[str, dict[str, Any]]) -> str:
    """The figures of `compare` in words."""
    return " ".join(
        f"{name} errs by {_points(difference['error'])} more than {first}: by {_points(difference['error_on_rare'])} "
        f"on names seen at most once, by {_points(difference['error_on_common'])} on names seen {COMMON[0]} times and "
        f"more; its rarity gap is wider by {_points(difference['rarity_gap'])}."
        for name, difference in found.items()
    )


def describe(figures: dict[str, Any]) -> str:
    """The figures of `analyze` in words."""
    whole, alike = figures["model"]["all"], figures["model"]["look-alikes"]
    rarest, commonest = whole["by_count"][0], whole["by_count"][-1]
    pull, endings = alike["pull"], whole["pull_of_endings"]
    text = [
        f"Of {whole['questions']} questions for names, {_percent(whole['error'])} are answered wrong: "
        f"{_percent(rarest['error'])} of those for names never seen in training, {_percent(commonest['error'])} of "
        f"those for names seen {commonest['seen']} times. Names seen at most once err by "
        f"{_points(whole['rarity_gap'])} more than names seen {COMMON[0]} times and more "
        f"({_points(alike['rarity_gap'])} among look-alikes); {_verdict(whole['rarity_gap'], 0)}.",
        f"Where a name that has look-alikes was taken for one of them, it was for a commoner one {pull['commoner']} "
        f"times and for a rarer one {pull['rarer']} times"
        + (f" ({_percent(pull)} commoner; a half if rarity did not matter)" if pull["value"] is not None else "")
        + f": {_verdict(pull, 0.5)}.",
        f"Of the answers that are no name, {endings['commoner']} end as a commoner name does and {endings['rarer']} as "
        f"a rarer one: {_verdict(endings, 0.5)}.",
    ]
    if "decoder alone" in figures:
        alone = figures["decoder alone"]["look-alikes"]
        text.append(
            f"The decoder alone, given the letters themselves, errs on {_percent(alone['error'])} of the look-alikes "
            f"(rarity gap {_points(alone['rarity_gap'])}; {alone['pull']['commoner']} commoner, "
            f"{alone['pull']['rarer']} rarer)."
        )
        text += _blamed(figures["tokens say the true letter"])
    return " ".join(text)


def _summarize(answers: Sequence[NameAnswer], seed: int) -> dict[str, Any]:
    wrong, asked = _count(answers, _is_wrong)
    kinds = {kind: _count(answers, lambda answer, kind=kind: answer.kind == kind)[0] for kind in KINDS[1:]}
    estimate = functools.partial(_bootstrap, groups=len(wrong), seed=seed)
    rare, common = _rate(wrong, asked, _IS_RARE), _rate(wrong, asked, _IS_COMMON)

    def pull(commoner, rarer):
        share = estimate(_rate(commoner, commoner + rarer, _ANY)).to_json()
        return {**share, "commoner": int(commoner.sum()), "rarer": int(rarer.sum())}

    return {
        "questions": int(asked.sum()),
        "error": estimate(_rate(wrong, asked, _ANY)).to_json(),
        "rarity_gap": estimate(lambda rows: rare(rows) - common(rows)).to_json(),
        "pull": pull(kinds["commoner look-alike"], kinds["rarer look-alike"]),
        "pull_of_endings": pull(kinds["commoner ending"], kinds["rarer ending"]),
        "by_count": [
            {
                "seen": count,
                "questions": int(asked[:, column].sum()),
                "error": estimate(_rate(wrong, asked, np.equal(COUNTS, count))).to_json(),
                "wrong": {kind: int(found[:, column].sum()) for kind, found in kinds.items()},
            }
            for column, count in enumerate(COUNTS)
        ],
    }


def _is_wrong(answer: NameAnswer) -> bool:
    return answer.kind != "right"


def _count(
    answers: Sequence[NameAnswer], of_interest: Callable[[NameAnswer], bool]
) -> tuple[Float[np.ndarray, "G C"], Float[np.ndarray, "G C"]]:
    """For each group and rarity, how many answers are of interest, and how many there are."""
    groups = {group: row for row, group in enumerate(sorted({answer.name.group for answer in answers}))}
    found, asked = np.zeros((2, len(groups), len(COUNTS)))
    for answer in answers:
        place = groups[answer.name.group], COUNTS.index(answer.name.seen)
        asked[place] += 1
        found[place] += of_interest(answer)
    return found, asked


def _rate(found, asked, columns) -> Figure:
    return lambda rows: found[rows][..., columns].sum((-2, -1)) / asked[rows][..., columns].sum((-2, -1))


def _bootstrap(figure: Figure, groups: int, seed: int) -> Estimate:
    rows = np.random.default_rng(seed).integers(0, max(groups, 1), (_RESAMPLINGS, groups))
    with np.errstate(invalid="ignore", divide="ignore"):
        value, resampled = figure(np.arange(groups)), figure(rows)
    resampled = resampled[~np.isnan(resampled)]
    low, high = np.quantile(resampled, (0.025, 0.975)) if len(resampled) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def _percent(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "none"
    return f"{100 * estimate['value']:.1f} % [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def _points(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "an unknown number of points"
    return f"{100 * estimate['value']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}] points"


def _blamed(says: dict[str, Any]) -> list[str]:
    """What `blame` says of right answers and of pulled ones, as far as there are any."""
    kinds = {"right": "right answers", "pulled": "answers pulled to a commoner name"}
    shares = [
        f"in {100 * says[kind]['share']:.0f} % (of {says[kind]['answers']}) of {title}"
        for kind, title in kinds.items()
        if says[kind]["answers"]
    ]
    if not shares:
        return []
    overruled = ": in the latter share the decoder overruled what it was told" if says["pulled"]["answers"] else ""
    return [
        "At the one letter that tells look-alikes apart the visual tokens are nearest to the true one "
        f"{' and '.join(shares)}{overruled}."
    ]


def _verdict(estimate: dict[str, Any], null: float) -> str:
    """Whether the interval holds what would be the case if rarity did not matter."""
    if estimate["value"] is None:
        return "too few to tell"
    if estimate["low"] > null:
        return "rarity costs"
    return "commonness costs" if estimate["high"] < null else "no effect of rarity can be told from chance"
