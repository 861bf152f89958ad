"""Scores of short answers: ANLS, relaxed accuracy and VQA accuracy."""

import re
from collections.abc import Sequence

from alignvlm_jax.data.edit_distance import edit_distance
from alignvlm_jax.evaluation.metrics.arguments import ScorerAborted, accepted_answers

_ANLS_THRESHOLD = 0.5
_RELAXED_TOLERANCE = 0.05
_VQA_ANSWERS = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
_ARTICLES = ("a", "an", "the")
# mmf passes re.UNICODE where re.sub takes the count, and re.UNICODE is 32.
_MOST_PERIODS = 32

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def anls(prediction: str, references: str | Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: DocVQA and InfoVQA.

    The RRC server's script (copied in QwenLM/Qwen-VL, eval_mm/infographicsvqa_eval.py). Blanks are collapsed and case
    is ignored; the best reference counts; a similarity below 0.5 is 0. Traps:

    - Exactly 0.5 is kept ("15" against "16"). The DUE evaluator and mPLUG-DocOwl make it 0.
    - The distance is measured on the collapsed texts but divided by the length of the original ones in upper case (ß
      counts two), so blanks raise a wrong answer's score: six blanks and nothing else score 0.67 for "ab". Newer
      versions of VLMEvalKit divide by the collapsed length.
    - Digits, punctuation, articles and accents count like any letter. A list is one string; InfoVQA's references name
      its permutations.
    - An empty answer scores 0, unless a reference is empty too.
    """
    best = 1 - min(_normalized_distance(reference, prediction) for reference in accepted_answers(references))
    return best if best >= _ANLS_THRESHOLD else 0.0


def _normalized_distance(reference: str, prediction: str) -> float:
    length = max(len(reference.upper()), len(prediction.upper()))
    return edit_distance(_collapsed(reference), _collapsed(prediction)) / length if length else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_accuracy(prediction: str, references: str | Sequence[str]) -> float:
    """Whether one answer is right within 5 % of a number, or else letter by letter, ignoring case: ChartQA.

    google-research/pix2struct, metrics.py, `relaxed_correctness`; lmms-eval agrees. 1 if any reference is met. Traps:

    - A number is what Python's `float` reads, so "1e3", "1_000" and full-width digits are; "1,000", "$5" and "five" are
      not. A text that ends in % loses every % at its end and is divided by 100: "50%" is "0.5", not "50".
    - A reference of zero is compared as text: "0.0" is wrong for "0".
    - "nan" and "inf" never match, not even themselves.
    - Floating point decides about exactly 5 %: 0.95 for 1 is wrong, 0.21 for 0.2 is right. Years get their 5 % too.
    - Blanks are not stripped from texts. VLMEvalKit strips the answer; mPLUG-DocOwl strips both, deletes newlines and
      drops a final period from the reference only.
    - Qwen-VL, and VLMEvalKit before September 2025, swap the arguments: their tolerance is 5 % of the answer.

    The data set's score is the mean over all questions, human and augmented alike.
    """
    return float(any(_is_relaxed_match(prediction, reference) for reference in accepted_answers(references)))


def _is_relaxed_match(prediction: str, reference: str) -> bool:
    number, target = _read_number(prediction), _read_number(reference)
    if number is not None and target:
        return abs(number - target) / abs(target) <= _RELAXED_TOLERANCE
    return prediction.lower() == reference.lower()


def _read_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _contractions() -> dict[str, str]:
    """From spellings that miss one of their apostrophes to the right ones."""
    fixes = {}
    for word in _CONTRACTED:
        for place in [i for i, letter in enumerate(word) if letter == "'"]:
            fixes[word[:place] + word[place + 1 :]] = word
    # The one that mmf's table has the wrong way round. Its "Im", "Ive" and the like are left out: text comes in lower
    # case, so they never match.
    return fixes | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def evalai_normalize(text: str) -> str:
    """An answer as EvalAI's processor rewrites it before comparing: TextVQA.

    facebookresearch/mmf, m4c_evaluators.py, `EvalAIAnswerProcessor`; lmms-eval has the same. In order: lower case;
    commas and question marks go; 's becomes a word; punctuation goes or becomes a blank; periods go; number words up
    to ten become digits, articles go, missing apostrophes return. Traps:

    - A punctuation mark that touches a blank anywhere is deleted everywhere ("red - blue-green" -> "red bluegreen"),
      else it becomes a blank. Commas went before, so "red,white" is "redwhite".
    - $ % # & * : apostrophes and smart quotes stay.
    - Periods before a digit stay, and so do all after the first 32 others. "5." is "5".
    - "none" is "0", and a lone letter a is an article: "vitamin a" is "vitamin".
    - "whats" is "what's", but "what's" is "what 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # Whether a mark touches a blank is asked of the text before any mark went.
    whole = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in whole or f" {mark}" in whole else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """How many of ten people gave this answer: 0.3 for one, 0.6, 0.9, and 1 from four on. TextVQA.

    facebookresearch/mmf, m4c_evaluators.py, `TextVQAAccuracyEvaluator`: against every nine of the ten references,
    min(1, matches / 3); the mean of those. All answers pass through `evalai_normalize` first. Traps:

    - An empty answer matches references that nothing is left of, such as "the".
    - VLMEvalKit's processor keeps commas, 's and "5." apart from this one's; the original VQA scorer leaves
      punctuation alone where all references agree.

    Raises:
      ScorerAborted: there are not ten references; the official scorer asserts it.
    """
    references = accepted_answers(references)
    if len(references) != _VQA_ANSWERS:
        raise ScorerAborted(f"VQA accuracy is defined for {_VQA_ANSWERS} references, these are {len(references)}")
    answer = evalai_normalize(prediction)
    matches = [evalai_normalize(reference) == answer for reference in references]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / _VQA_ANSWERS
