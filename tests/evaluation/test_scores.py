"""Tests of scores and their intervals, and of the verdicts of the official code of the general benchmarks."""

import numpy as np
import pytest

from alignvlm_jax.evaluation import metrics
from alignvlm_jax.evaluation.scores import mean, ratio


def test_intervals_cover_the_true_value_as_often_as_they_claim():
    rng = np.random.default_rng(0)
    # As for forms: few documents, with many values each.
    inside = 0
    for _ in range(60):
        sizes = rng.integers(1, 9, 80)
        right = rng.binomial(sizes, 0.7)
        low, high = ratio("", right, sizes).interval
        inside += low <= 0.7 <= high
    assert 51 <= inside <= 60
    graded = mean("", rng.uniform(0.2, 1, 500))
    assert graded.interval[0] < 0.6 < graded.interval[1] < 0.65
    assert mean("", [1.0] * 20).interval == pytest.approx((0.8389, 1.0), abs=1e-3), "Wilson's"
    assert mean("", []).interval is None and ratio("", [], []).count == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    # Results of MMMU's parse_multi_choice_response (lmms-eval 0.7.3), with None where it guesses.
    [
        ("B", "B"),
        ("(B) because (A) is wrong", "A"),
        ("A, no: B", "B"),
        ("NASA", "A"),
        ("b", None),
        ("the thing shown there is a dog, I think", "C"),
        ("a dog", None),
        ("A.\nC.", "C"),
        ("C.B.x", "B"),
        ("", None),
        ("E", None),
    ],
)
def test_mmmu_options(answer, letter):
    assert metrics.mmmu_choice(answer, ["cat", "bird", "a dog"]) == letter


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    # Results of MMMU's parse_open_response and eval_open (lmms-eval 0.7.3).
    [
        ("The answer is 1,234.", ["1234"], True),
        ("x = 3 so y = 6.004", ["6"], True),
        ("6.006", ["6"], False),
        ("5 or 6", ["6"], True),
        ("5 thus = ", ["5"], True),
        ("this is the Mona Lisa", ["mona lisa"], True),
        ("a", ["a"], True),
        ("banana", ["a"], False),
        ("", ["5"], False),
    ],
)
def test_mmmu_open_answers(answer, references, right):
    assert metrics.mmmu_open(answer, references) == right


def test_other_verdicts():
    assert [metrics.pope_says_yes(text) for text in ("Yes", "No, ...", "There is not. Yes", "", "NO")] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert metrics.seed_accuracy(" b) two", "B") == 1 and metrics.seed_accuracy("", "B") == 0
    assert metrics.gqa_accuracy("Left.", "left") == 1 and metrics.gqa_accuracy("the left", "left") == 0
