"""Metrics of the general benchmarks: MMMU's options and open answers, SEED-Bench's letters, POPE's yes or no, GQA."""

import re
import string
from collections.abc import Sequence

from alignvlm_jax.evaluation.metrics.arguments import accepted_answers

_MARKS_AROUND = ",.!?;:'"
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # in scientific notation
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # plain
)


def mmmu_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """Returns the letter that an answer names, or None if it names none, for MMMU's multiple-choice questions.

    Reproduces `parse_multi_choice_response` in MMMU-Benchmark/MMMU, eval/eval_utils.py; lmms-eval has the same code. It
    searches for "(A)", then for "A" before a space or the end, then for "A.", and then, in answers of more than five
    words, for the text of an option, ignoring case. The first search that finds an option decides. If it finds several,
    the one closest to the end of the answer counts.

    Details that affect scores:

    - If nothing is found, the official code guesses at random. Its score then differs from run to run, and empty
      answers score 1 in 4. Here the result is None, which counts as wrong; report the share of such answers too.
    - Only capital letters count, and the end of a word is enough: "NASA" names A.
    - Among several letters before periods, the first option wins instead of the last one named.

    Args:
      prediction: answer of the model.
      choices: texts of the options; their letters are A, B, ...
    """
    # One pass over the marks, as in the official code: of "B.'" the period remains, because ' comes last.
    for mark in _MARKS_AROUND:
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    # The official code detects a letter by one pattern and locates it by another. A letter before a period is never
    # located: all positions are -1, and `max` returns the first letter.
    for detected, located in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in letters if detected.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(located.format(letter)))
    # The official code searches for the texts of options only in answers of more than five words.
    if len(text.split()) <= 5:
        return None
    positions = {letter: text.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    positions = {letter: position for letter, position in positions.items() if position >= 0}
    return max(positions, key=positions.__getitem__) if positions else None


def mmmu_open(prediction: str, references: Sequence[str]) -> bool:
    """Returns whether an open answer contains an accepted answer, for MMMU.

    Reproduces `parse_open_response` and `eval_open` in MMMU-Benchmark/MMMU, eval/eval_utils.py. The candidates are the
    shortest text after words like "is" or "therefore" in each line of the answer (in the last line also after "="), or
    the whole answer if there is no such text, and all numbers in these texts. A number is right if it equals an
    accepted number, both rounded to two decimals. A text is right if it contains an accepted text.

    Details that affect scores:

    - The official code splits sentences at capital letters, but only after lower-casing, so only lines are split.
    - "is " is also found within words, such as "this ".
    - An accepted text of a single letter must be next to a space in the answer.
    """
    # A reference is normalized like a candidate, so numbers are compared with numbers and texts with texts.
    accepted = {value for reference in accepted_answers(references) for value in _normalized(reference)}
    parts = _key_parts(prediction)
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    for candidate in {value for part in [*parts, *numbers] for value in _normalized(part)}:
        if isinstance(candidate, float) and candidate in accepted:
            return True
        if isinstance(candidate, str) and any(isinstance(value, str) and value in candidate for value in accepted):
            return True
    return False


def _key_parts(prediction: str) -> list[str]:
    """Returns the texts after words like "is", one per line that has any, or else the whole answer."""
    answer = prediction.strip().strip(".").lower()
    lines = answer.split("\n")
    parts = []
    for i, line in enumerate(lines):
        leads = (*_LEADS, "=") if i == len(lines) - 1 else _LEADS
        shortest = ""
        for lead in leads:
            tail = line.split(lead)[-1].strip()
            # As in the official code, an empty tail replaces an earlier one, and is replaced by any later one.
            if lead in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [answer]


def _normalized(text: str) -> list[float | str]:
    """Returns a number rounded to two decimals, a text in lower case, or a letter with a space before and after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def seed_accuracy(prediction: str, reference: str) -> float:
    """Returns 1 if an answer starts with the right letter, for SEED-Bench.

    Reproduces lmms-eval, tasks/seedbench/utils.py. SEED-Bench's own code ranks the options by their likelihoods
    instead. Only the first letter counts, so "A dog" is A even if another option is "A dog".
    """
    return float(prediction.strip()[:1].lower() == reference.strip().lower())


def pope_says_yes(prediction: str) -> bool:
    """Returns whether an answer counts as yes, for POPE.

    Reproduces evaluate.py in AoiDragon/POPE. Only the text before the first period counts, without commas. It is a no
    if one of its words is "No", "no" or "not", and a yes otherwise. An empty answer is therefore a yes, and so is "NO".
    lmms-eval compares the whole answer, in lower case, with "yes" and "no" instead.
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & {*words}


def gqa_accuracy(prediction: str, reference: str) -> float:
    """Returns 1 if an answer equals the reference apart from case and punctuation, for GQA.

    Reproduces lmms-eval, tasks/gqa (exact_match, ignore_case, ignore_punctuation). GQA's own eval.py compares the texts
    unchanged; LLaVA lower-cases answers and drops a final period before it calls that script.
    """
    punctuation = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(punctuation) == reference.lower().translate(punctuation))
