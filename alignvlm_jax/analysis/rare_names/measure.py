"""Measures the effect of rarity on answers about names.

    error against rarity    share of wrong answers by the number of training pages that print the name
    rarity gap              error on names seen at most once minus error on names seen 64 times or more
    pull                    share of more common names among the wrong answers that are another name of the group. All
                            names are asked for equally often, so this is 1/2 if rarity does not matter
    pull of endings         the same for wrong answers that are not names, but end like another name of the corpus
    letter agreement        how often the visual tokens are nearest to the true letter (`answers.py`)

Intervals are 95 % percentile intervals of a bootstrap over groups of names, because answers about one name are not
independent. Axes: G groups, C counts (rarities), R resamplings.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from alignvlm_jax.analysis.rare_names.kinds import KINDS, NameAnswer, distinguishing_letters
from alignvlm_jax.data.synthetic.names import COUNTS, Name
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally

RARE, COMMON = COUNTS[:2], COUNTS[-2:]
_IS_RARE, _IS_COMMON, _ANY = (np.isin(COUNTS, counts) for counts in (RARE, COMMON, COUNTS))
_RESAMPLINGS = 2000

Statistic = Callable[[Int[np.ndarray, "*R G"]], Float[np.ndarray, "*R"]]
"""Maps a choice of groups (rows) to a number, for any number of choices at once."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; NaN if there are no answers to count."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Returns the estimate as JSON values, with null for NaN."""
        fields = dataclasses.asdict(self)
        return {name: None if np.isnan(number) else round(number, 4) for name, number in fields.items()}


def summarize(answers: Sequence[NameAnswer], *, seed: int = 0) -> dict[str, Any]:
    """Returns the measures of one model's answers as JSON: over all names, those with look-alikes, and the loners.

    Args:
      answers: from `answers.ask_names` or `answers.ask_decoder`.
      seed: seed of the bootstrap.
    """
    subsets = {"all": (True, False), "look-alikes": (True,), "loners": (False,)}
    return {
        subset: _summarize([answer for answer in answers if answer.name.has_look_alikes in values], seed)
        for subset, values in subsets.items()
    }


def compare(answers: Sequence[NameAnswer], others: Sequence[NameAnswer], *, seed: int = 0) -> dict[str, Any]:
    """Returns the error of `others` minus the error of `answers`, paired by group, as JSON.

    The differences cover all names, rare names, common names, and the rarity gap.

    Raises:
      UserError: if the two are not about the same names.
    """
    (wrong, totals), (other_wrong, other_totals) = _count(answers, _is_wrong), _count(others, _is_wrong)
    if not np.array_equal(totals > 0, other_totals > 0):
        raise UserError("the answers to compare are about different names: ask both models about the same pages")

    def difference(columns: Bool[np.ndarray, " C"]) -> Statistic:
        # Both rates use the same resampled groups, so the variation between groups cancels in their difference.
        rate, other_rate = _rate(wrong, totals, columns), _rate(other_wrong, other_totals, columns)
        return lambda rows: other_rate(rows) - rate(rows)

    statistics = {
        "error": difference(_ANY),
        "error_on_rare": difference(_IS_RARE),
        "error_on_common": difference(_IS_COMMON),
        "rarity_gap": lambda rows: difference(_IS_RARE)(rows) - difference(_IS_COMMON)(rows),
    }
    return {name: _bootstrap(statistic, len(wrong), seed).to_json() for name, statistic in statistics.items()}


def letter_agreement(answers: Sequence[NameAnswer], lexicon: Sequence[Name]) -> dict[str, Any]:
    """Returns how often the visual tokens are nearest to the true letter, by kind of answer and by rarity, as JSON.

    Args:
      answers: from `answers.read_letters`.
      lexicon: the names of the corpus.
    """
    letters = distinguishing_letters(lexicon)
    measured = [answer for answer in answers if answer.letter is not None]
    pulled = [answer for answer in measured if answer.kind == "commoner look-alike"]

    def share(chosen: Sequence[NameAnswer], text: Callable[[NameAnswer], str]) -> dict[str, Any]:
        agree = sum(answer.letter == text(answer)[letters[answer.name.group][0]] for answer in chosen)
        tally = Tally(agree, len(chosen)).to_json()
        return {"share": tally["exact_match"], "interval_95": tally["interval_95"], "answers": len(chosen)}

    def true_text(answer: NameAnswer) -> str:
        return answer.name.text

    return {
        "right": share([answer for answer in measured if answer.kind == "right"], true_text),
        "wrong": share([answer for answer in measured if answer.kind != "right"], true_text),
        "pulled": share(pulled, true_text),
        "pulled, to the letter answered": share(pulled, lambda answer: answer.predicted),
        "by_count": {
            str(count): share([answer for answer in measured if answer.name.seen == count], true_text)
            for count in COUNTS
        },
    }


def _summarize(answers: Sequence[NameAnswer], seed: int) -> dict[str, Any]:
    wrong, totals = _count(answers, _is_wrong)
    # Counts of each kind of wrong answer; KINDS[0] is "right".
    kinds = {kind: _count(answers, lambda answer, kind=kind: answer.kind == kind)[0] for kind in KINDS[1:]}
    estimate = functools.partial(_bootstrap, groups=len(wrong), seed=seed)
    rare, common = _rate(wrong, totals, _IS_RARE), _rate(wrong, totals, _IS_COMMON)

    def pull(commoner: Float[np.ndarray, "G C"], rarer: Float[np.ndarray, "G C"]) -> dict[str, Any]:
        share = estimate(_rate(commoner, commoner + rarer, _ANY)).to_json()
        return {**share, "commoner": int(commoner.sum()), "rarer": int(rarer.sum())}

    return {
        "questions": int(totals.sum()),
        "error": estimate(_rate(wrong, totals, _ANY)).to_json(),
        "rarity_gap": estimate(lambda rows: rare(rows) - common(rows)).to_json(),
        "pull": pull(kinds["commoner look-alike"], kinds["rarer look-alike"]),
        "pull_of_endings": pull(kinds["commoner ending"], kinds["rarer ending"]),
        "by_count": [
            {
                "seen": count,
                "questions": int(totals[:, column].sum()),
                "error": estimate(_rate(wrong, totals, np.equal(COUNTS, count))).to_json(),
                "wrong": {kind: int(counts[:, column].sum()) for kind, counts in kinds.items()},
            }
            for column, count in enumerate(COUNTS)
        ],
    }


def _is_wrong(answer: NameAnswer) -> bool:
    return answer.kind != "right"


def _count(
    answers: Sequence[NameAnswer], is_counted: Callable[[NameAnswer], bool]
) -> tuple[Float[np.ndarray, "G C"], Float[np.ndarray, "G C"]]:
    """Returns the number of answers that `is_counted` accepts, and of all answers, for each group and rarity."""
    # Groups may be numbered with gaps, so every group that occurs gets a row of its own.
    groups = {group: row for row, group in enumerate(sorted({answer.name.group for answer in answers}))}
    counted, totals = np.zeros((2, len(groups), len(COUNTS)))
    for answer in answers:
        cell = groups[answer.name.group], COUNTS.index(answer.name.seen)
        totals[cell] += 1
        counted[cell] += is_counted(answer)
    return counted, totals


def _rate(
    counted: Float[np.ndarray, "G C"], totals: Float[np.ndarray, "G C"], columns: Bool[np.ndarray, " C"]
) -> Statistic:
    # The ratio of sums over the chosen groups. A bootstrap sample may choose a group several times.
    return lambda rows: counted[rows][..., columns].sum((-2, -1)) / totals[rows][..., columns].sum((-2, -1))


def _bootstrap(statistic: Statistic, groups: int, seed: int) -> Estimate:
    # Every resampling draws with replacement, as many groups as there are. The fixed seed draws the same groups for all
    # statistics, so differences between models are paired.
    rows = np.random.default_rng(seed).integers(0, max(groups, 1), (_RESAMPLINGS, groups))
    # A resampling without any answer of the kind gives 0 / 0 and is excluded from the interval.
    with np.errstate(invalid="ignore", divide="ignore"):
        value, resampled = statistic(np.arange(groups)), statistic(rows)
    resampled = resampled[~np.isnan(resampled)]
    low, high = np.quantile(resampled, (0.025, 0.975)) if len(resampled) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
