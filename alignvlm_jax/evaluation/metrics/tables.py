"""Scores of questions about tables: WikiTableQuestions' denotations, TabFact and TableVQA-Bench.

WikiTableQuestions' official evaluator runs on Python 2.7; TableVQA-Bench holds a copy of it that runs on Python 3. The
same lines decide differently there, so what is shared here is told which Python it stands for.
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
_UNKNOWN = -1

_QUOTES = str.maketrans(dict.fromkeys("‘’´`", "'") | dict.fromkeys("“”", '"') | dict.fromkeys("‐‑‒–—−", "-"))
# At the end: brackets with anything in them, or with digits where the text has nothing before them; and footnote marks.
# The official expression lets digits in brackets match in two ways, and takes exponential time over many of them. To
# Python 2's, only ASCII's digits are digits.
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
# In this order: first those after a blank, with the blank.
_SCALES = (
    *((re.compile(rf" \b{word}\b"), power) for word, power in _POWERS),
    *((re.compile(rf"\b{word}\b"), power) for word, power in _POWERS),
    (re.compile(" ?%"), "e-2"),
)


def wtq_denotation(
    predicted_items: Sequence[str], targets: Sequence[str], target_canon: Sequence[str] | None = None
) -> bool:
    """Whether the predicted items are the target ones, as a set: WikiTableQuestions.

    ppasupat/WikiTableQuestions, evaluator.py 1.0.2, run on Python 2.7. There must be as many distinct items as targets,
    and each target must equal an item: in its normalised text, as a number within 1e-6, or as a date. Normalised: no
    accents, plain quotes and dashes, no citations, footnote marks, details in brackets or quotes at the ends, no final
    period, single blanks, lower case. Traps:

    - Give `target_canon`: through it "4" is right for "4 events", and "1990-01-02" for "January 2, 1990". DUE's,
      mPLUG-DocOwl's and TableVQA-Bench's copies go without.
    - "1,000", "50%" and "$5" are texts, not numbers; "nan" and "inf" too. "3-2-1" is a date, "1990-xx-xx"
      the number 1990.
    - A number within 1e-6 of a whole one is cut, not rounded: 3.9999999 is 3.
    - "C++" is "C"; "Italy (ITA)." keeps its bracket, the period being looked at last.
    - Equal numbers are one item: "1" and "1.0". No items at all are wrong, an empty one fits only an empty target.
    - A model's answer is not split here. DUE's baselines split at " | ", TableVQA-Bench at "|" and "||", mPLUG-DocOwl
      never: it loses every question with several targets.
    - Python 2 knows no "1_000" but reads "- 5", and lowers Σ always to σ. What cannot be had here are its older Unicode
      tables (5.2).

    Args:
      predicted_items: the model's, split.
      targets: `targetValue` of the data set, split and unescaped.
      target_canon: `targetCanon`, likewise: the targets as numbers or dates. An empty one is as its target.

    Raises:
      ScorerAborted: where the official evaluator would, at numbers too large for a float, or if there are not as many
        canonical values as targets.
    """
    check_texts("predicted_items", predicted_items)
    check_texts("targets", targets)
    if target_canon is None:
        target_canon = targets
    check_texts("target_canon", target_canon)
    if len(target_canon) != len(targets):
        raise ScorerAborted(f"there are {len(targets)} targets, but {len(target_canon)} canonical values of them")
    return _is_same_set(_read(predicted_items, predicted_items, 2), _read(targets, target_canon, 2))


def tabfact_accuracy(prediction: str, reference: str) -> float:
    """Whether the verdict is the right one, "True" or "False": TabFact.

    X-PLUG/mPLUG-DocOwl, DocOwl1.5/evaluation, metric ExactAccuracy: the same text once both are stripped and their
    newlines deleted. Traps:

    - Case counts: "true" is wrong.
    - One final period is dropped from the reference only: "True." is wrong even for "True."
    - The DUE route instead ignores case and stops at any other answer; TableVQA-Bench looks for the word within the
      answer. Scores of models that answer at length differ widely between them.
    """
    reference = _one_line(reference).removesuffix(".")
    return float(_one_line(prediction) == reference)


def _one_line(text: str) -> str:
    return text.replace("\n", "").strip()


def tablevqa_correct(subset: str, prediction: str, reference: str | int) -> bool:
    """Whether one answer of TableVQA-Bench is right.

    naver-ai/tablevqabench, src/evaluate_tablevqa_dataset.py. By subset, with its traps:

    - vwtq, vwtq_syn: items are split at "|" (in the answer also at "||") and compared as in `wtq_denotation`, but
      without canonical values, and on Python 3: "1_000" is a number, and "nan" or "inf" as an item ends the official
      run.
    - vtabfact: the answer contains "true" or "false", in any case, and not both: "untrue" and "not true" are true. The
      reference is 1 or 0.
    - fintabnetqa: the headline score, which also lets numbers match without their unit: "$3,852 billion" is right for
      "$3,852 million" (the strict score is the bench's second one). $ ( ) and commas are deleted, so "(1,234)" is not
      negative; words like "shares" or "years" go; "million" becomes e6, but not in "3million"; % becomes e-2.

    VLMEvalKit drops a leading "Answer: " first; it is kept here. The bench's overall accuracy weighs subsets by their
    questions.

    Raises:
      ScorerAborted: where the official scorer would.
    """
    if subset in ("vwtq", "vwtq_syn"):
        predicted, expected = _unescaped(prediction.replace("||", "|")), _unescaped(str(reference))
        return _is_same_set(_read(predicted, predicted, 3), _read(expected, expected, 3))
    if subset == "vtabfact":
        if reference not in (0, 1, "0", "1"):
            raise UserError(f"reference {reference!r} of vtabfact: 1 and 0 are known")
        says_true, says_false = "true" in prediction.lower(), "false" in prediction.lower()
        return says_true != says_false and says_true == bool(int(reference))
    if subset == "fintabnetqa":
        expected = _amounts(str(reference))
        return any(amount == other for amount in _amounts(prediction) for other in expected)
    raise UserError(f"subset {subset!r} of TableVQA-Bench: vwtq, vwtq_syn, vtabfact and fintabnetqa are known")


def fintabnetqa_strictly_correct(prediction: str, reference: str | int) -> bool:
    """Whether an answer of TableVQA-Bench's fintabnetqa is right with its unit: the bench's second, strict score.

    As `tablevqa_correct`, but numbers must be equal as they are scaled: "$641.8 million" is wrong for "$641.8".
    """
    return _amounts(str(reference))[0] == _amounts(prediction)[0]


def _unescaped(text: str) -> list[str]:
    r"""The items of a list as the data set writes it: joined by bars, with \n, \p for a bar, and \\."""
    return [item.replace(r"\n", "\n").replace(r"\p", "|").replace(r"\\", "\\") for item in text.split("|")]


def _amounts(text: str) -> tuple[float, float] | tuple[str, str]:
    """The text as a number, with its scale and without; as texts if either is none."""
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
      kind: what it was read as.
      content: the number; the date as year, month and day, some unknown; or the normalised text.
      text: the normalised text.
    """

    kind: Literal["number", "date", "text"]
    content: int | float | tuple[int, int, int] | str
    text: str


def _read(texts: Sequence[str], canonical: Sequence[str], python: _Python) -> list[_Value]:
    """The distinct values of texts. Of equal ones the first stays, and with it its spelling."""
    try:
        values = [_value(text, canon or text, python) for text, canon in zip(texts, canonical, strict=True)]
    except OverflowError as error:
        raise ScorerAborted(f"the official scorer fails at a number in {list(texts)}: {error}") from error
    distinct = {}
    for value in values:
        distinct.setdefault((value.kind, value.content), value)
    return list(distinct.values())


def _is_same_set(predicted: list[_Value], targets: list[_Value]) -> bool:
    if len(predicted) != len(targets):
        return False
    return all(any(_is_same(target, value) for value in predicted) for target in targets)


def _is_same(target: _Value, predicted: _Value) -> bool:
    if target.text == predicted.text:
        return True
    if target.kind != predicted.kind:
        return False
    if target.kind != "number":
        return target.content == predicted.content
    try:
        return abs(target.content - predicted.content) < _SAME_NUMBER
    except OverflowError as error:
        raise ScorerAborted(f"the official scorer fails at the number {predicted.text}: {error}") from error


def _value(text: str, canonical: str, python: _Python) -> _Value:
    number, date = _number(canonical, python), None
    if number is None:
        date = _date(canonical, python)
        if date and date[1] == date[2] == _UNKNOWN:
            number, date = date[0], None
    if number is not None:
        if python == 2:
            float(number)  # Python 2 rounds through floats: a number too long for one is an OverflowError there too.
        if abs(number - round(number)) < _SAME_NUMBER:
            number = int(number)
        return _Value("number", number, _normalize(text, python) if text else str(number))
    if date:
        if python == 2 and date[0] >= 2**63:
            raise ScorerAborted(f"the official scorer fails at {canonical!r}: its year is a Python 2 long")
        year, month = ("xx" if part == _UNKNOWN else part for part in date[:2])  # as there, and not the day
        return _Value("date", date, _normalize(text, python) if text else f"{year}-{month}-{date[2]}")
    normalized = _normalize(text, python)
    return _Value("text", normalized, normalized)


def _normalize(text: str, python: _Python) -> str:
    """The text without what the evaluator holds for decoration."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = text.translate(_QUOTES)
    before = None
    while text != before:
        before = text
        text = _CITATIONS[python].sub("", text.strip())
        text = _DETAILS.sub("", text.strip())
        text = _QUOTED.sub(r"\1", text.strip())
    text = re.sub(r"\s+", " ", text.removesuffix("."))
    # Python 2 lowers letter by letter; Python 3 turns a Σ that ends a word into ς.
    text = "".join(c.lower() for c in text) if python == 2 else text.lower()
    return text.strip()


def _number(text: str, python: _Python) -> int | float | None:
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
        # The copy forgot to catch its own assertion.
        raise ScorerAborted(f"the official scorer fails at {text!r}: neither a finite number nor a text to it")
    return None


def _integer(text: str, python: _Python) -> int:
    """int(text) of that Python: 2 knows no underscores, and lets blanks follow the sign."""
    if python == 3:
        return int(text)
    if not _PYTHON2_INTEGER.fullmatch(text):
        raise ValueError(f"not an integer: {text!r}")
    return int("".join(text.split()))


def _date(text: str, python: _Python) -> tuple[int, int, int] | None:
    """Year, month and day of y-m-d, where xx is unknown; None if it is no such text, or nothing is known."""
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
