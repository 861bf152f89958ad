"""The metric of values read from forms: DUE's F1 (DeepForm, KLC)."""

from collections.abc import Sequence


def due_f1(
    documents_predicted: Sequence[Sequence[tuple[str, str]]],
    documents_expected: Sequence[Sequence[tuple[str, str | Sequence[str]]]],
) -> float:
    """Returns F1 over the values of all documents, for DeepForm and KLC.

    Reproduces `DueEvaluator` in due-benchmark/evaluator with metric F1 and ignore_case. A predicted value is right if
    its key equals an expected key, and its upper-cased text equals one of the accepted values in upper case.

    Details that affect scores:

    - F1 is a micro average: precision is over all predicted values, recall over all expected ones.
    - Only the case of values is normalized. Spaces, dates and currencies count as written, and "1,000" differs from
      "1000". "A | B" is one value, and so is an empty string.
    - Within a document, each predicted value is paired with the first unpaired value that it equals. A second
      prediction of the same value is wrong. The greedy order can lose a match that another pairing would find.
    - Documents are paired by position; their names are not checked. Surplus documents on either side do not count, so
      a run that stopped halfway does not lose score.
    - A document without values on both sides has no effect. The score is 0 if there are no values at all. A reference
      key without a value is not counted as missed.
    - mPLUG-DocOwl asks one question per key, strips answers, deletes their newlines and drops the answer "None" (but
      not "none" or "None."). This raises the score, and is left to the caller.

    Args:
      documents_predicted: list of (key, value) for each document.
      documents_expected: list of (key, accepted values) for each document, with one entry per expected value. A string
        is the only accepted value.
    """
    num_predicted = num_expected = num_right = 0
    # `zip` is not strict: like the evaluator, it drops surplus documents.
    for predicted, document in zip(documents_predicted, documents_expected, strict=False):
        entries = [(key, [accepted] if isinstance(accepted, str) else accepted) for key, accepted in document]
        expected = [(key, accepted) for key, accepted in entries if len(accepted)]
        num_predicted += len(predicted)
        num_expected += len(expected)
        # For recall, the evaluator pairs again, starting from the expected side. Both directions take the first match,
        # so the pairs are the same.
        num_right += _num_paired(predicted, expected)
    precision = num_right / num_predicted if num_predicted else 0.0
    recall = num_right / num_expected if num_expected else 0.0
    return 2 * precision * recall / (precision + recall) if precision or recall else 0.0


def _num_paired(predicted: Sequence[tuple[str, str]], expected: Sequence[tuple[str, Sequence[str]]]) -> int:
    """Returns the number of pairs when each predicted value takes the first unpaired expected value that matches."""
    # Upper case is the evaluator's way to ignore case: "ß" equals "ss", unlike in lower case.
    unpaired = [(key, [value.upper() for value in accepted]) for key, accepted in expected]
    for key, value in predicted:
        matches = (i for i, (other, accepted) in enumerate(unpaired) if key == other and value.upper() in accepted)
        index = next(matches, None)
        if index is not None:
            del unpaired[index]
    return len(expected) - len(unpaired)
