"""Warnings about answers that nobody should believe.

    answer = reader.ask("receipt.png", "What is the total?")
    answer.warnings       # {"loop": "the answer repeats '.2'", "page_scale": "the page is shown at 0.21 of its size"}

The kinds of warnings, and the rule of each:

    untrained    No training step has changed the connector since it was drawn at random (`connector_training.py`).
    page_scale   The page is shrunk more than the pages of the training: its scale is less than 0.8 times the scale
                 that 95 % of the training pages reach (`data/page_scale.py`). A checkpoint without that record has no
                 such warning.
    empty        The answer has no text.
    cut_off      The model had not ended its answer after `max_new_tokens` tokens.
    loop         At least half of the answer is one unit again and again: a unit of two or more characters five times
                 (four times if it is not only letters and digits), or one character twelve times. At the end of an
                 answer that is cut off, three times are enough if they take 20 characters. "111111" and "2.2.2" are
                 not loops.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

# A page counts as shrunk if its scale is less than this part of the scale of the training pages.
_SCALE_TOLERANCE = 0.8
_REPEATED = re.compile(r"(.{1,60}?)\1{3,}", re.DOTALL)
# Of an answer that is cut off: repetitions at its end, characters that they take together, and longest unit.
_REPETITIONS, _TAIL, _LONGEST_UNIT = 3, 20, 200

# What each kind says about a number of answers.
_COUNTED = {
    "empty": "empty",
    "cut_off": "cut off",
    "loop": "in a loop",
    "page_scale": "about a page that is shown smaller than the pages of the training",
}


class AnswerText(str):
    """The text of an answer, with warnings.

    Attributes:
      warnings: a sentence for each kind of warning; see the module docstring. Empty for an answer without warnings.
    """

    warnings: dict[str, str]

    def __new__(cls, text: str, warnings: Mapping[str, str] | None = None) -> "AnswerText":
        """Returns the text with these warnings."""
        answer = super().__new__(cls, text)
        answer.warnings = dict(warnings or {})
        return answer

    def __getnewargs__(self) -> tuple[str, dict[str, str]]:
        return str(self), self.warnings


def describe_text(text: str, *, num_tokens: int, max_new_tokens: int) -> dict[str, str]:
    """Returns the warnings about the text of an answer, by kind.

    Args:
      text: text of the answer.
      num_tokens: number of its tokens, without the token that ends it.
      max_new_tokens: largest number of tokens that the model could generate.
    """
    warnings = {}
    is_cut_off = num_tokens >= max_new_tokens
    if not text.strip():
        warnings["empty"] = "the answer is empty"
    if is_cut_off:
        warnings["cut_off"] = f"the answer is cut off after {max_new_tokens} tokens"
    if unit := find_loop(text, is_cut_off=is_cut_off):
        warnings["loop"] = f"the answer repeats {unit!r}"
    return warnings


def find_loop(text: str, *, is_cut_off: bool) -> str | None:
    """Returns the unit that an answer repeats, or None if it is not in a loop."""
    for match in _REPEATED.finditer(text):
        unit, repeated = match[1], match.group()
        if len(repeated) >= _needed_repetitions(unit) * len(unit) and 2 * len(repeated) >= len(text):
            return unit
    if is_cut_off:
        for length in range(1, min(len(text) // _REPETITIONS, _LONGEST_UNIT) + 1):
            if _periodic_end(text, length) >= max(_REPETITIONS * length, _TAIL):
                return text[-length:]
    return None


def _needed_repetitions(unit: str) -> int:
    if len(unit) == 1:
        return 12
    return 5 if unit.isalnum() else 4


def _periodic_end(text: str, period: int) -> int:
    """Returns the length of the longest end of a text in which every character equals the one `period` before it."""
    covered = period
    while covered < len(text) and text[-1 - covered] == text[-1 - covered + period]:
        covered += 1
    return covered


def describe_scale(scale: float, trained_scale: float | None) -> dict[str, str]:
    """Returns the warning about a page that is shrunk more than the pages of the training, if it is."""
    if trained_scale is None or scale >= _SCALE_TOLERANCE * trained_scale:
        return {}
    return {
        "page_scale": f"the page is shown at {scale:.2f} of its size, and the pages of the training at "
        f"{trained_scale:.2f} or more: small text may be unreadable; crop the page to the part that is asked about"
    }


def warn_about(answer: AnswerText) -> None:
    """Prints the warnings about an answer as one line on stderr, if there are any."""
    if answer.warnings:
        print(f"warning: {'; '.join(answer.warnings.values())}", file=sys.stderr)


def count_warnings(answers: Iterable[Iterable[str]]) -> dict[str, int]:
    """Returns the number of answers with each kind of warning, given the kinds of every answer."""
    counts = Counter(kind for kinds in answers for kind in kinds)
    return dict(sorted(counts.items()))


def format_counts(counts: Mapping[str, int], total: int) -> str:
    """Returns the counts as a sentence ("of 1049 answers, 12 are cut off and 3 in a loop"), or "" if there are none."""
    parts = [f"{counts[kind]} {words}" for kind, words in _COUNTED.items() if counts.get(kind)]
    return f"of {total} answers: {', '.join(parts)}" if parts else ""
