"""The score of values read from forms: DUE's F1."""

from collections.abc import Sequence


def due_f1(
    documents_predicted: Sequence[Sequence[tuple[str, str]]],
    documents_expected: Sequence[Sequence[tuple[str, str | Sequence[str]]]],
) -> float:
    """F1 over all values of all documents: DeepForm and KLC.

    due-benchmark/evaluator, `DueEvaluator` with metric F1 and ignore_case. A predicted value is right if its key is the
    expected one's and it equals one of that one's accepted values in upper case. Traps:

    - Micro: precision over all predicted values, recall over all expected ones.
    - Nothing is normalised but the values' case: blanks, dates and currencies count, and "1,000" is not "1000". "A | B"
      is one value, and so is an empty string.
    - Within a document, each value takes the first partner left that it equals. A second prediction of one value is
      wrong; and what takes another's only partner can cost a match that a better pairing would find.
    - Documents pair by position, whatever their names, and those that one side has more of vanish: a run that stopped
      half-way loses nothing.
    - Two documents without values change nothing; no values at all score 0. A key of the reference without a value to
      be found is none that is missed.
    - mPLUG-DocOwl asks one question a key, strips answers, deletes their newlines and drops the answer "None" (not
      "none" or "None."), which raises this score; that is for whoever prepares the predictions.

    Args:
      documents_predicted: a document is a list of (key, value).
      documents_expected: a document is a list of (key, accepted values), one entry for every value to be found. A
        string is the only value accepted.
    """
    num_predicted = num_expected = num_right = 0
    # Not strict: see the trap above.
    for predicted, document in zip(documents_predicted, documents_expected, strict=False):
        listed = [(key, [accepted] if isinstance(accepted, str) else accepted) for key, accepted in document]
        expected = [(key, accepted) for key, accepted in listed if len(accepted)]
        num_predicted += len(predicted)
        num_expected += len(expected)
        # For the recall, the evaluator pairs again from the expected side. As each side takes whom the other lists
        # first, those are the same pairs.
        num_right += _num_paired(predicted, expected)
    precision = num_right / num_predicted if num_predicted else 0.0
    recall = num_right / num_expected if num_expected else 0.0
    return 2 * precision * recall / (precision + recall) if precision or recall else 0.0


def _num_paired(predicted: Sequence[tuple[str, str]], expected: Sequence[tuple[str, Sequence[str]]]) -> int:
    """How many predicted values find a partner, each taking the first that fits of those left."""
    left = [(key, [value.upper() for value in accepted]) for key, accepted in expected]
    for key, value in predicted:
        fits = (i for i, (other, accepted) in enumerate(left) if key == other and value.upper() in accepted)
        place = next(fits, None)
        if place is not None:
            del left[place]
    return len(expected) - len(left)
