"""The metrics of texts restored from their visible parts: VCR's exact match and Jaccard index."""

import difflib
import functools
from collections.abc import Callable, Sequence

from alignvlm_jax.errors import UserError

_REFUSALS = ("I can't", "I cannot", "无法", "抱歉")
_SEPARATOR = {"en": " ", "zh": ""}  # Joins the tokens of a window.
_CHINESE_MODEL = "zh_core_web_sm"


def vcr_scores(prediction: str, references: str | Sequence[str], language: str) -> tuple[list[float], list[float]]:
    """Returns exact match and Jaccard index of every covered text of one image, for VCR.

    Reproduces src/evaluation/evaluation_metrics.py in tianyu-z/VCR; lmms-eval and VLMEvalKit agree. A window as long as
    the covered text, in tokens, slides over the answer. The position most similar to the covered text is scored
    (`difflib`; the first one on ties). It is an exact match if its tokens are those of the covered text; the Jaccard
    index compares both sets of tokens.

    Details that affect scores:

    - A window must share a token with the covered text. An answer one token too short has no window, and both scores
      are 0.
    - The Jaccard index ignores order: a permutation scores 1, but is no exact match.
    - Case counts. Double spaces and newlines are tokens.
    - "I can't", "I cannot", "sorry" (in any case), 无法 or 抱歉 anywhere in the answer make all its scores 0, even if
      the covered text contains the word. (The official filter is less strict for some models that it knows by name.)
    - Text before the last "Assistant: " is ignored here, but scored by lmms-eval.
    - The score of the data set is the mean over covered texts, not over images.

    Tokens are spaCy's. English uses its rules (the trained parts of en_core_web_sm only tag tokens), and Chinese the
    trained zh_core_web_sm.

    Args:
      prediction: answer of the model, with all covered texts.
      references: covered texts. A string is taken as the only one. An empty list gives empty results.
      language: en or zh.

    Returns:
      Exact matches (0 or 1) and Jaccard indices, in the order of the references.
    """
    if isinstance(references, str):
        references = (references,)
    if language not in _SEPARATOR:
        raise UserError(f"unknown language {language!r} of VCR: expected one of en and zh")
    answer = prediction.split("Assistant: ")[-1]
    if "sorry" in answer.lower() or any(refusal in answer for refusal in _REFUSALS):
        return [0.0] * len(references), [0.0] * len(references)
    tokenize = _tokenizer(language)
    tokens = tokenize(answer)
    exact, jaccard = [], []
    for reference in references:
        reference_tokens = tokenize(reference)
        window = _best_window(tokens, reference_tokens, reference, _SEPARATOR[language])
        exact.append(float(bool(window) and window == reference_tokens))
        jaccard.append(len({*window} & {*reference_tokens}) / len({*window, *reference_tokens}) if window else 0.0)
    return exact, jaccard


def _best_window(tokens: list[str], reference_tokens: list[str], text: str, separator: str) -> list[str]:
    """Returns the window of tokens whose text is most similar to `text`; empty if no window shares a token."""
    # `ratio` depends on the order of its texts, so the order is the official one. The second text is preprocessed by
    # `SequenceMatcher`, and therefore set only once.
    matcher = difflib.SequenceMatcher(None, "", text)
    best, similarity = [], 0.0
    for start in range(len(tokens) - len(reference_tokens) + 1):
        window = tokens[start : start + len(reference_tokens)]
        if set(window).isdisjoint(reference_tokens):
            continue
        matcher.set_seq1(separator.join(window))
        ratio = matcher.ratio()
        if ratio > similarity:
            best, similarity = window, ratio
    return best


@functools.cache
def _tokenizer(language: str) -> Callable[[str], list[str]]:
    try:
        import spacy
    except ImportError as error:
        raise UserError("VCR's score needs spaCy. Install it with: pip install 'alignvlm-jax[eval]'") from error
    if language == "en":
        tokenizer = spacy.blank("en").tokenizer
    else:
        try:
            tokenizer = spacy.load(_CHINESE_MODEL).tokenizer
        except (ImportError, OSError) as error:
            # The package of that name on PyPI is not spaCy's.
            raise UserError(
                f"VCR's score in Chinese needs spaCy's {_CHINESE_MODEL}. Install it with: python -m spacy download "
                f"{_CHINESE_MODEL} (not from PyPI, where that name is another package)"
            ) from error
    return lambda text: [token.text for token in tokenizer(text)]
