"""The score of texts restored from their visible parts: VCR's exact match and Jaccard."""

import difflib
import functools
from collections.abc import Callable, Sequence

from alignvlm_jax.errors import UserError

_REFUSALS = ("I can't", "I cannot", "无法", "抱歉")
_BLANK = {"en": " ", "zh": ""}
_CHINESE_MODEL = "zh_core_web_sm"


def vcr_scores(prediction: str, references: str | Sequence[str], language: str) -> tuple[list[float], list[float]]:
    """Exact match and Jaccard index of every covered text of one image: VCR.

    tianyu-z/VCR, src/evaluation/evaluation_metrics.py; lmms-eval and VLMEvalKit agree. Of the answer's windows as long
    as the covered text, in tokens, the most similar one (`difflib`, first on ties) is scored: exact if its tokens are
    the covered text's, and the Jaccard index of both sets of tokens. Traps:

    - A window must share a token, and be as long: an answer one token too short scores 0 by both.
    - The Jaccard index knows no order: a permutation has 1, and no exact match.
    - Case counts. Double blanks and newlines are tokens.
    - "I can't", "I cannot", "sorry" (in any case), 无法 or 抱歉 anywhere in the answer make all its scores 0, even if
      the covered text has the word. (The official filter knows some models by name, and is laxer for them.)
    - What comes before the last "Assistant: " is ignored. lmms-eval looks at it.
    - The data set's score is the mean over covered texts, not over images.

    Tokens are spaCy's: by its rules for English (en_core_web_sm's trained parts only tag them), and by the trained
    zh_core_web_sm for Chinese.

    Args:
      prediction: the model's answer, meant to hold all covered texts.
      references: the covered texts; a string is the only one. Without any there is nothing to score.
      language: en or zh.

    Returns:
      The exact matches (0 or 1) and the Jaccard indices, in the order of the references.
    """
    if isinstance(references, str):
        references = (references,)
    if language not in _BLANK:
        raise UserError(f"language {language!r} of VCR: en and zh are known")
    answer = prediction.split("Assistant: ")[-1]
    if "sorry" in answer.lower() or any(refusal in answer for refusal in _REFUSALS):
        return [0.0] * len(references), [0.0] * len(references)
    tokenize = _tokenizer(language)
    tokens = tokenize(answer)
    exact, jaccard = [], []
    for reference in references:
        wanted = tokenize(reference)
        window = _best_window(tokens, wanted, reference, _BLANK[language])
        exact.append(float(bool(window) and window == wanted))
        jaccard.append(len({*window} & {*wanted}) / len({*window, *wanted}) if window else 0.0)
    return exact, jaccard


def _best_window(tokens: list[str], wanted: list[str], text: str, blank: str) -> list[str]:
    """The tokens in a row, as many as wanted, whose text is most like `text`; none if no window shares a token."""
    # The order of arguments matters to it. It prepares its second text, so that one is set once.
    matcher = difflib.SequenceMatcher(None, "", text)
    best, similarity = [], 0.0
    for start in range(len(tokens) - len(wanted) + 1):
        window = tokens[start : start + len(wanted)]
        if set(window).isdisjoint(wanted):
            continue
        matcher.set_seq1(blank.join(window))
        ratio = matcher.ratio()
        if ratio > similarity:
            best, similarity = window, ratio
    return best


@functools.cache
def _tokenizer(language: str) -> Callable[[str], list[str]]:
    try:
        import spacy
    except ImportError as error:
        raise UserError("VCR's score needs spaCy's tokens: pip install 'alignvlm-jax[eval]'") from error
    if language == "en":
        tokenizer = spacy.blank("en").tokenizer
    else:
        try:
            tokenizer = spacy.load(_CHINESE_MODEL).tokenizer
        except (ImportError, OSError) as error:
            # PyPI's package of that name is not spaCy's.
            raise UserError(
                f"VCR's score in Chinese needs spaCy's {_CHINESE_MODEL}: python -m spacy download {_CHINESE_MODEL} "
                "(do not take PyPI's package of that name)"
            ) from error
    return lambda text: [token.text for token in tokenizer(text)]
