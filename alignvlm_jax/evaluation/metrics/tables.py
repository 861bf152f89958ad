"""Metrics of questions about tables: WikiTableQuestions' denotation accuracy, TabFact and TableVQA-Bench.

The official evaluator of WikiTableQuestions runs on Python 2.7. TableVQA-Bench runs a copy of it on Python 3, where the
same code gives other results. The functions shared by both therefore take the Python version to imitate.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.metrics.arguments import ScorerAborted, check_texts

_Python = Literal[2, 3]

_SAME_NUMBER = 1e-6
_UNKNOWN = -1  # A part of a date that is given as xx.

_QUOTES = str.maketrans(dict.fromkeys("‘’´`", "'") | dict.fromkeys("“”", '"') | dict.fromkeys("‐‑‒–—−", "-"))
# Citations at the end of a text: brackets with any content (or only digits, if they start the text) and footnote marks.
# In the official expression, digits in brackets match in two ways, which takes exponential time for many of them; here,
# the position decides between the two. In Python 2, only ASCII digits are digits.
_CITATIONS = {
    python: re.compile(rf"(?:(?<!^)\[[^\]]*\]|^\[{digit}+\]|[•♦†‡*#+])*$")
    for python, digit in ((2, "[0-9]"), (3, r"\d"))
}
_DETAILS = re.compile(r"(?<!^)(?: \([^)]*\))*$")
_QUOTED = re.compile(r'^"([^"]*)"$')
_PYTHON2_INTEGER = re.compile(r"\s*[+-]?\s*\d+\s*")

_UNITS = re.compile(
    r"\b(?:dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe)s?\b", re.IGNORECASE
)
_POWERS = (("thousand", "e3"), ("million", "e6"), ("billion", "e9"))
# The order matters: a word after a space is replaced first, together with the space.
_SCALES = (
    *((re.compile(rf" \b{word}\b"), power) for word, power in _POWERS),
    *((re.compile(rf"\b{word}\b"), power) for word, power in _POWERS),
    (re.compile(" ?%"), "e-2"),
)


def wtq_denotation(
    predicted_items: Sequence[str], targets: Sequence[str], target_canon: Sequence[str] | None = None
) -> bool:
    """Returns whether the predicted items equal the target items as a set, for WikiTableQuestions.

    Reproduces evaluator.py 1.0.2 in ppasupat/WikiTableQuestions, run on Python 2.7. The number of distinct items must
    equal the number of distinct targets, and each target must equal an item: as normalized text, as a number within
    1e-6, or as a date. Normalized text has no accents, plain quotes and dashes, no citations, footnote marks or details
    in brackets at its end, no outer quotes, no final period, single blanks, and lower case.

    Details that affect scores:

    - `target_canon` matters: with it, "4" is right for "4 events", and "1990-01-02" for "January 2, 1990". The copies
      in DUE, mPLUG-DocOwl and TableVQA-Bench do not use it.
    - "1,000", "50%" and "$5" are texts, not numbers, and so are "nan" and "inf". "3-2-1" is a date, and "1990-xx-xx" is
      the number 1990.
    - A number within 1e-6 of an integer is truncated, not rounded: 3.9999999 is 3.
    - "C++" equals "C". "Italy (ITA)." keeps its bracket, because the final period is removed last.
    - Equal numbers such as "1" and "1.0" are one item. An empty list is wrong. An empty item matches only an empty
      target.
    - The answer of a model is not split here. The DUE baselines split at " | ", TableVQA-Bench at "|" and "||".
      mPLUG-DocOwl never splits, so questions with several targets score 0.
    - Python 2 rejects "1_000", accepts "- 5", and always lower-cases Σ to σ. Its older Unicode tables (5.2) are not
      imitated.

    Args:
      predicted_items: items of the model's answer.
      targets: field `targetValue` of the data set, split and unescaped.
      target_canon: field `targetCanon` of the data set, split and unescaped: the targets as numbers or dates. An empty
        string stands for the target itself.

    Raises:
      ScorerAborted: if a number is too large for a float, where the official evaluator also fails, or if the number of
        canonical values differs from the number of targets.
    """
    check_texts("predicted_items", predicted_items)
    check_texts("targets", targets)
    if target_canon is None:
        target_canon = targets
    check_texts("target_canon", target_canon)
    if len(target_canon) != len(targets):
        raise ScorerAborted(f"target_canon: expected {len(targets)} values, one per target, got {len(target_canon)}")
    return _is_same_set(_read(predicted_items, predicted_items, 2), _read(targets, target_canon, 2))


def tabfact_accuracy(prediction: str, reference: str) -> float:
    """Returns 1 if a verdict equals the reference, "True" or "False", for TabFact.

    Reproduces the metric ExactAccuracy in X-PLUG/mPLUG-DocOwl, DocOwl1.5/evaluation: newlines are deleted and both
    texts are stripped before the comparison.

    Details that affect scores:

    - Case counts: "true" is wrong.
    - A final period is dropped from the reference only: "True." is wrong even for "True."
    - The scorers differ widely for models with long answers. The DUE evaluation ignores case and fails at any other
      answer; TableVQA-Bench searches for the word within the answer.
    """
    reference = _one_line(reference).removesuffix(".")
    return float(_one_line(prediction) == reference)


def _one_line(text: str) -> str:
    return text.replace("\n", "").strip()


def tablevqa_correct(subset: str, prediction: str, reference: str | int) -> bool:
    """Returns whether one answer to TableVQA-Bench is right.

    Reproduces src/evaluate_tablevqa_dataset.py in naver-ai/tablevqabench. The rules differ by subset:

    - vwtq, vwtq_syn: items are split at "|" (in the answer also at "||") and compared as in `wtq_denotation`, but
      without canonical values and as on Python 3. "1_000" is a number, and an item "nan" or "inf" ends the official
      run.
    - vtabfact: the answer must contain "true" or "false", in any case, but not both. "untrue" and "not true" count as
      true. The reference is 1 or 0.
    - fintabnetqa: the main ("relieved") score, for which numbers may also match without their scale: "$3,852 billion"
      is right for "$3,852 million". $ ( ) and commas are deleted, so "(1,234)" is not negative. Words like "shares" or
      "years" are deleted. "million" becomes e6, but not in "3million"; % becomes e-2.

    VLMEvalKit first drops a leading "Answer: ", which is kept here. The overall accuracy of the benchmark weights the
    subsets by their number of questions.

    Raises:
      ScorerAborted: if the official scorer would fail.
      UserError: if the subset or the reference is unknown.
    """
    if subset in ("vwtq", "vwtq_syn"):
        predicted, expected = _unescaped(prediction.replace("||", "|")), _unescaped(str(reference))
        return _is_same_set(_read(predicted, predicted, 3), _read(expected, expected, 3))
    if subset == "vtabfact":
        if reference not in (0, 1, "0", "1"):
            raise UserError(f"reference {reference!r} of vtabfact: expected 1 or 0")
        says_true, says_false = "true" in prediction.lower(), "false" in prediction.lower()
        return says_true != says_false and says_true == bool(int(reference))
    if subset == "fintabnetqa":
        expected = _amounts(str(reference))
        return any(amount == other for amount in _amounts(prediction) for other in expected)
    raise UserError(
        f"unknown subset {subset!r} of TableVQA-Bench: expected one of vwtq, vwtq_syn, vtabfact and fintabnetqa"
    )


def fintabnetqa_strictly_correct(prediction: str, reference: str | int) -> bool:
    """Returns whether an answer to TableVQA-Bench's fintabnetqa is right, including its scale.

    This is the benchmark's second, strict score. It differs from `tablevqa_correct` in that the scaled numbers must be
    equal: "$641.8 million" is wrong for "$641.8".
    """
    return _amounts(str(reference))[0] == _amounts(prediction)[0]


def _unescaped(text: str) -> list[str]:
    r"""Returns the items of a list in the data set's notation: joined by bars, with \n, \p (a bar) and \\ escaped."""
    return [item.replace(r"\n", "\n").replace(r"\p", "|").replace(r"\\", "\\") for item in text.split("|")]


def _amounts(text: str) -> tuple[float, float] | tuple[str, str]:
    """Returns the text as a number with and without its scale, or both as texts if either is not a number."""
    scaled = _UNITS.sub("", re.sub(r"[$(),]", "", _normalize(text, 3)))
    bare = scaled
    for scale, power in _SCALES:
        scaled, bare = scale.sub(power, scaled), scale.sub("", bare)
    try:
        return float(scaled), float(bare)
    except ValueError:
        return scaled, bare


class _Value(NamedTuple):
    """An item of a denotation.

    Attributes:
      kind: type of the value.
      content: the number; the date as year, month and day, where -1 is unknown; or the normalized text.
      text: normalized text.
    """

    kind: Literal["number", "date", "text"]
    content: int | float | tuple[int, int, int] | str
    text: str


def _read(texts: Sequence[str], canonical: Sequence[str], python: _Python) -> list[_Value]:
    """Returns the distinct values of texts. Of equal values, the first one is kept, with its spelling."""
    try:
        values = [_value(text, canon or text, python) for text, canon in zip(texts, canonical, strict=True)]
    except OverflowError as error:
        raise ScorerAborted(f"the official scorer fails on a number in {list(texts)}: {error}") from error
    distinct = {}
    for value in values:
        distinct.setdefault((value.kind, value.content), value)
    return list(distinct.values())


def _is_same_set(predicted: list[_Value], targets: list[_Value]) -> bool:
    """Returns whether there are as many values as targets and each target has an equal value."""
    if len(predicted) != len(targets):
        return False
    return all(any(_is_same(target, value) for value in predicted) for target in targets)


def _is_same(target: _Value, predicted: _Value) -> bool:
    """Returns whether two values have equal texts, or are of the same kind with equal contents."""
    if target.text == predicted.text:
        return True
    if target.kind != predicted.kind:
        return False
    if target.kind != "number":
        return target.content == predicted.content
    try:
        return abs(target.content - predicted.content) < _SAME_NUMBER
    except OverflowError as error:
        raise ScorerAborted(f"the official scorer fails on the number {predicted.text}: {error}") from error


def _value(text: str, canonical: str, python: _Python) -> _Value:
    """Returns a text as a number, a date or a text, depending on its canonical value."""
    # The official order: a number, or else a date, or else a text. A date with only a year is a number.
    number, date = _number(canonical, python), None
    if number is None:
        date = _date(canonical, python)
        if date and date[1] == date[2] == _UNKNOWN:
            number, date = date[0], None
    if number is not None:
        if python == 2:
            float(number)  # Python 2 rounds via a float, and raises OverflowError if the number is too large for one.
        # Truncated, not rounded, as in the official code.
        if abs(number - round(number)) < _SAME_NUMBER:
            number = int(number)
        return _Value("number", number, _normalize(text, python) if text else str(number))
    if date:
        if python == 2 and date[0] >= 2**63:
            raise ScorerAborted(f"the official scorer fails on {canonical!r}: its year is a Python 2 long")
        # Like the official code, this replaces an unknown year and month, but not the day.
        year, month = ("xx" if part == _UNKNOWN else part for part in date[:2])
        return _Value("date", date, _normalize(text, python) if text else f"{year}-{month}-{date[2]}")
    normalized = _normalize(text, python)
    return _Value("text", normalized, normalized)


def _normalize(text: str, python: _Python) -> str:
    """Returns the text as the evaluator normalizes it."""
    # NFKD splits accents from their letters, into characters of category Mn.
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = text.translate(_QUOTES)
    # Removing one kind of decoration can reveal another.
    before = None
    while text != before:
        before = text
        text = _CITATIONS[python].sub("", text.strip())
        text = _DETAILS.sub("", text.strip())
        text = _QUOTED.sub(r"\1", text.strip())
    text = re.sub(r"\s+", " ", text.removesuffix("."))
    # Python 2 lower-cases each letter on its own. Python 3 turns a Σ at the end of a word into ς.
    text = "".join(c.lower() for c in text) if python == 2 else text.lower()
    return text.strip()


def _number(text: str, python: _Python) -> int | float | None:
    """Returns the finite number that a text denotes, or None."""
    # Integers come first, because they keep their exact value, however long they are.
    try:
        return _integer(text, python)
    except ValueError:
        pass
    if python == 2 and "_" in text:
        return None
    try:
        # Python 2 also strips separators such as \x1c.
        number = float(text.strip() if python == 2 else text)
    except ValueError:
        return None
    if math.isfinite(number):
        return number
    if python == 3:
        # TableVQA-Bench's copy does not catch its own assertion.
        raise ScorerAborted(f"the official scorer fails on {text!r}: it accepts it neither as a number nor as a text")
    return None


def _integer(text: str, python: _Python) -> int:
    """Returns int(text) as computed by that version of Python."""
    # Python 2 rejects underscores, and allows spaces after the sign.
    if python == 3:
        return int(text)
    if not _PYTHON2_INTEGER.fullmatch(text):
        raise ValueError(f"not an integer: {text!r}")
    return int("".join(text.split()))


def _date(text: str, python: _Python) -> tuple[int, int, int] | None:
    """Returns (year, month, day) of a text y-m-d, in which xx is unknown, or None for other texts and xx-xx-xx."""
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    unknown = [part == "xx" or (part == "xxxx" and i == 0) for i, part in enumerate(parts)]
    if all(unknown):
        return None
    try:
        year, month, day = (_UNKNOWN if no else _integer(part, python) for part, no in zip(parts, unknown, strict=True))
    except ValueError:
        return None
    if month not in (_UNKNOWN, *range(1, 13)) or day not in (_UNKNOWN, *range(1, 32)):
        return None
    return year, month, day
