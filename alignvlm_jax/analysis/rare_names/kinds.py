"""Kinds of answers to questions that ask for names: right, a look-alike, another name, an ending, or garble."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignvlm_jax.data.edit_distance import edit_distance
from alignvlm_jax.data.synthetic.names import LOOK_ALIKE, Name
from alignvlm_jax.evaluation.report import Answer

KINDS = (
    "right",
    "commoner look-alike",
    "rarer look-alike",
    "elsewhere on the page",
    "another name",
    "commoner ending",
    "rarer ending",
    "garble",
)
"""All kinds of answers.

The last three are not names of the corpus. The two before "garble" end like another name, but may begin differently.
"""

_MIN_ENDING = 3  # letters


@dataclasses.dataclass(frozen=True)
class NameAnswer:
    """An answer to a question that asks for a name of the lexicon.

    Attributes:
      document: id of the page.
      name: the right answer.
      predicted: the model's answer.
      kind: one of `KINDS`.
      letter: for names with look-alikes, the letter to which the visual tokens are nearest, among the letters that
        distinguish the names of the group; None if it was not measured.
    """

    document: str
    name: Name
    predicted: str
    kind: str
    letter: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the answer as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "NameAnswer":
        """Returns the answer from the JSON values of `to_json`."""
        return cls(**{**fields, "name": Name(**fields["name"])})


def classify(answers: Sequence[Answer], lexicon: Sequence[Name]) -> list[NameAnswer]:
    """Returns the answers to questions that ask for names, each with its kind. Other answers are skipped.

    Args:
      answers: all answers about each page. Their expected texts tell what else is printed on the page.
      lexicon: the names of the corpus.
    """
    # All expected answers about a page are printed on it.
    names, endings = {name.text: name for name in lexicon}, count_endings(lexicon)
    printed = collections.defaultdict(set)
    for answer in answers:
        printed[answer.document].add(answer.expected)
    classified = []
    for answer in answers:
        if answer.expected in names:
            name, predicted = names[answer.expected], answer.predicted.strip()
            kind = _kind(name, predicted, names, printed[answer.document])
            kind = classify_ending(name, predicted, endings) if kind == "garble" else kind
            classified.append(NameAnswer(answer.document, name, predicted, kind))
    return classified


def _kind(name: Name, predicted: str, names: Mapping[str, Name], printed: set[str]) -> str:
    if predicted == name.text:
        return "right"
    if predicted in printed:
        return "elsewhere on the page"
    other = names.get(predicted)
    if other is None:
        return "garble"
    if edit_distance(predicted, name.text) > LOOK_ALIKE:
        return "another name"
    return "commoner look-alike" if other.seen > name.seen else "rarer look-alike"


def count_endings(lexicon: Iterable[Name]) -> collections.Counter[str]:
    """Returns, for every ending of every name, the number of training pages that print a name with that ending."""
    counts: collections.Counter[str] = collections.Counter()
    for name in lexicon:
        counts.update({name.text[-length:]: name.seen for length in range(_MIN_ENDING, len(name.text) + 1)})
    return counts


def classify_ending(name: Name, predicted: str, endings: Mapping[str, int]) -> str:
    """Returns whether an answer that is not a name has a more common or a rarer ending than the right answer.

    The longest known ending of the answer is compared with the same number of last letters of the right answer. All
    names are asked for equally often, so both kinds are equally frequent if rarity does not matter.

    Args:
      name: the right answer.
      predicted: the model's answer.
      endings: from `count_endings`.
    """
    length = max((n for n in range(_MIN_ENDING, len(predicted) + 1) if predicted[-n:] in endings), default=0)
    predicted_ending, true_ending = predicted[-length:], name.text[-length:]
    if not length or endings[predicted_ending] == endings[true_ending]:
        return "garble"
    return "commoner ending" if endings[predicted_ending] > endings[true_ending] else "rarer ending"


def distinguishing_letters(lexicon: Iterable[Name]) -> dict[int, tuple[int, str]]:
    """Returns, for each group of look-alikes, the position at which its names differ and their letters there."""
    groups = collections.defaultdict(list)
    for name in lexicon:
        if name.has_look_alikes:
            groups[name.group].append(name.text)
    # Look-alikes have equal lengths and differ in one position.
    letters = {}
    for group, texts in groups.items():
        position = next(i for i, column in enumerate(zip(*texts, strict=True)) if len(set(column)) > 1)
        letters[group] = position, "".join([text[position] for text in texts])
    return letters
