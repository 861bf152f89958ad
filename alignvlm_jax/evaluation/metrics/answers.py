"""Metrics of short answers: ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA) and VQA accuracy (TextVQA)."""

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
# mmf passes re.UNICODE, whose value is 32, as the argument `count` of re.sub.
_MAX_PERIODS = 32

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
    """Returns the normalized Levenshtein similarity (ANLS) of one answer, for DocVQA and InfoVQA.

    Reproduces the script of the RRC server (copied in QwenLM/Qwen-VL, eval_mm/infographicsvqa_eval.py). Both texts are
    stripped and lower-cased, and runs of whitespace are collapsed. The similarity is 1 minus the edit distance over the
    length of the longer text. The most similar reference counts, and a similarity below 0.5 becomes 0.

    Details that affect scores:

    - Exactly 0.5 is kept ("15" for "16"). The DUE evaluator, mPLUG-DocOwl and pix2struct make it 0.
    - The distance is between the collapsed texts, but it is divided by the length of the original ones in upper case
      (ß counts as two letters). Extra spaces therefore raise the score of a wrong answer: six spaces alone score 0.67
      for "ab". Newer versions of VLMEvalKit divide by the collapsed length.
    - Digits, punctuation, articles and accents count like any letter. A list is one string; InfoVQA lists its
      permutations as references.
    - An empty answer scores 0, unless a reference is empty too.
    """
    best = 1 - min(_normalized_distance(reference, prediction) for reference in accepted_answers(references))
    return best if best >= _ANLS_THRESHOLD else 0.0


def _normalized_distance(reference: str, prediction: str) -> float:
    # The official script measures the length before it collapses whitespace.
    length = max(len(reference.upper()), len(prediction.upper()))
    return edit_distance(_collapsed(reference), _collapsed(prediction)) / length if length else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_accuracy(prediction: str, references: str | Sequence[str]) -> float:
    """Returns 1 if an answer is within 5 % of a number, or equals a text apart from case, for ChartQA.

    Reproduces `relaxed_correctness` in google-research/pix2struct, metrics.py; lmms-eval agrees. One matching reference
    is enough. The score of the data set is the mean over all questions, human and augmented.

    Details that affect scores:

    - A number is anything that Python's `float` accepts: "1e3", "1_000" and full-width digits, but not "1,000", "$5"
      or "five". A text that ends in % loses all its final % signs and is divided by 100: "50%" equals "0.5", not "50".
    - A reference of zero is compared as text: "0.0" is wrong for "0".
    - "nan" and "inf" never match, not even themselves.
    - Floating-point rounding decides at exactly 5 %: 0.95 for 1 is wrong, 0.21 for 0.2 is right. The tolerance also
      applies to years, so 1999 is right for 2019.
    - Texts are not stripped. VLMEvalKit strips the answer. mPLUG-DocOwl strips both, deletes newlines, and drops a
      final period from the reference only.
    - Qwen-VL, and VLMEvalKit before September 2025, swap the arguments: their tolerance is 5 % of the answer.
    """
    return float(any(_is_relaxed_match(prediction, reference) for reference in accepted_answers(references)))


def _is_relaxed_match(prediction: str, reference: str) -> bool:
    number, target = _read_number(prediction), _read_number(reference)
    # A relative error to zero is undefined, so a target of zero falls through to the comparison of texts.
    if number is not None and target:
        return abs(number - target) / abs(target) <= _RELAXED_TOLERANCE
    return prediction.lower() == reference.lower()


def _read_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _contractions() -> dict[str, str]:
    """Returns a mapping from contractions that lack an apostrophe to their correct spelling."""
    # A word with several apostrophes has an entry for each one that may be missing.
    fixes = {}
    for word in _CONTRACTED:
        for place in [i for i, letter in enumerate(word) if letter == "'"]:
            fixes[word[:place] + word[place + 1 :]] = word
    # mmf's table has this entry the wrong way round. Its "Im", "Ive" and similar entries are omitted: the text is
    # lower-cased first, so they never match.
    return fixes | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def evalai_normalize(text: str) -> str:
    """Returns an answer rewritten as by EvalAI's processor before the comparison, for TextVQA.

    Reproduces `EvalAIAnswerProcessor` in facebookresearch/mmf, m4c_evaluators.py; lmms-eval has the same code. It
    lower-cases the text, deletes commas and question marks, separates 's, deletes punctuation or replaces it by a
    space, deletes periods, turns number words up to ten into digits, drops articles, and restores missing apostrophes,
    in this order.

    Details that affect scores:

    - A punctuation mark that touches a space anywhere in the text is deleted everywhere ("red - blue-green" becomes
      "red bluegreen"); otherwise it becomes a space. Commas are deleted before that, so "red,white" is "redwhite".
    - The characters $ % # & * : and apostrophes and smart quotes are kept.
    - Periods before a digit are kept. Of the others, only the first 32 are deleted. "5." becomes "5".
    - "none" becomes "0". The word "a" always counts as an article: "vitamin a" becomes "vitamin".
    - "whats" becomes "what's", but "what's" becomes "what 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # As in mmf, a mark is compared with the text as it was before any mark was replaced.
    original = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in original or f" {mark}" in original else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Returns the VQA accuracy of one answer, for TextVQA.

    Reproduces `TextVQAAccuracyEvaluator` in facebookresearch/mmf, m4c_evaluators.py. The score is the mean of
    min(1, matches / 3) over the ten sets of nine references: 0.3 if one of ten people gave this answer, 0.6 if two,
    0.9 if three, and 1 if four or more. All answers are normalized by `evalai_normalize` first.

    Details that affect scores:

    - An empty answer matches references that are empty after normalization, such as "the".
    - VLMEvalKit's processor treats commas, 's and "5." differently. The original VQA scorer leaves punctuation
      unchanged if all references agree.

    Raises:
      ScorerAborted: if there are not exactly ten references, which the official scorer asserts.
    """
    references = accepted_answers(references)
    if len(references) != _VQA_ANSWERS:
        raise ScorerAborted(f"VQA accuracy needs {_VQA_ANSWERS} references, got {len(references)}")
    answer = evalai_normalize(prediction)
    matches = [evalai_normalize(reference) == answer for reference in references]
    # Each of the ten terms omits one reference, and with it that reference's match.
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / _VQA_ANSWERS
