"""Scores of short verdicts: MMMU's options and open answers, SEED-Bench's letters, POPE's yes and no, GQA's words."""

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
    """The letter that an answer names, or None if it names none: MMMU's multiple choice.

    MMMU-Benchmark/MMMU, eval/eval_utils.py, `parse_multi_choice_response`; lmms-eval has the same. Looked for, until
    something is found: "(A)"; "A" before a blank or the end; "A."; and in answers of more than five words the options'
    own texts, ignoring case. Of several the one that stands last counts. Traps:

    - Where nothing is found, the official code guesses at random, so that its score differs from run to run and no
      answer at all scores 1 in 4. Here that is None, which is wrong; give the share of them beside.
    - Letters count in capitals only, and the end of a word is one: "NASA" names A.
    - Among several letters found before periods, the first option wins, not the last one named.

    Args:
      prediction: the model's answer.
      choices: the options' texts; their letters are A, B, ...
    """
    for mark in _MARKS_AROUND:
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    for shape, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if shape.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))  # The first of equals.
    if len(text.split()) <= 5:
        return None
    spelled = {letter: text.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    spelled = {letter: at for letter, at in spelled.items() if at >= 0}
    return max(spelled, key=spelled.__getitem__) if spelled else None


def mmmu_open(prediction: str, references: Sequence[str]) -> bool:
    """Whether an open answer holds one of the accepted ones: MMMU.

    MMMU-Benchmark/MMMU, eval/eval_utils.py, `parse_open_response` and `eval_open`. From each line of the answer the
    shortest text after words like "is" or "therefore" is taken (in the last line also after "="), or the whole answer
    if there are none, and from that all numbers. A number is right if it equals an accepted one, both rounded to two
    decimals; a text if an accepted text is part of it. Traps:

    - Everything is in lower case before it is split at sentences that begin with a capital: only lines are split.
    - "is " is found within words: "this " ends in it.
    - An accepted text of one letter must touch a blank in the answer.
    """
    accepted = {value for reference in accepted_answers(references) for value in _normalized(reference)}
    taken = _key_parts(prediction)
    numbers = [number for part in taken for pattern in _NUMBERS for number in pattern.findall(part)]
    for said in {value for part in [*taken, *numbers] for value in _normalized(part)}:
        if isinstance(said, float) and said in accepted:
            return True
        if isinstance(said, str) and any(isinstance(value, str) and value in said for value in accepted):
            return True
    return False


def _key_parts(prediction: str) -> list[str]:
    whole = prediction.strip().strip(".").lower()
    lines = whole.split("\n")
    parts = []
    for i, line in enumerate(lines):
        leads = (*_LEADS, "=") if i == len(lines) - 1 else _LEADS
        shortest = ""
        for lead in leads:
            tail = line.split(lead)[-1].strip()
            # An empty one replaces what was found, and is replaced by whatever follows.
            if lead in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [whole]


def _normalized(text: str) -> list[float | str]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def seed_accuracy(prediction: str, reference: str) -> float:
    """Whether the first letter of the answer is the right one: SEED-Bench.

    lmms-eval, tasks/seedbench/utils.py. SEED-Bench's own code instead ranks the options by their likelihoods. Trap: of
    an answer in words only the first letter is looked at, so "A dog" is A, whatever option says so.
    """
    return float(prediction.strip()[:1].lower() == reference.strip().lower())


def pope_says_yes(prediction: str) -> bool:
    """Whether an answer means yes: POPE.

    AoiDragon/POPE, evaluate.py. Of the text before the first period, without commas: no if one of its words is "No",
    "no" or "not", else yes. Traps: whatever does not deny is a yes, an empty answer too; "NO" is a yes. lmms-eval
    instead compares the whole answer, in lower case, with "yes" and "no".
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & {*words}


def gqa_accuracy(prediction: str, reference: str) -> float:
    """Whether an answer is the expected one but for case and punctuation: GQA.

    lmms-eval, tasks/gqa (exact_match, ignore_case, ignore_punctuation). GQA's own eval.py compares the texts as they
    are; LLaVA, before handing answers to it, lowers them and drops a period at their end.
    """
    drop = str.maketrans("", "", string.punctuation)
    return float(prediction.lower().translate(drop) == reference.lower().translate(drop))
