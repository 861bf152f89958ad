"""Metrics of a user's own data set."""

import pytest

from alignvlm_jax.evaluation.answer_metrics import METRICS, format_scores
from alignvlm_jax.evaluation.report import Answer, Report, format_table


def answers(*texts: tuple[str, str], document: str = "d") -> list[Answer]:
    """Returns answers of (predicted, expected) about one document."""
    return [
        Answer(document, "form", "", f"Key {i}?", expected, predicted) for i, (predicted, expected) in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("predicted", "expected", "scores"),
    [
        (" Mill Road ", "Mill Road\n", {"exact": 1, "anls": 1, "relaxed": 1, "f1": 1}),
        ("mill road", "Mill Road", {"exact": 0, "anls": 1, "relaxed": 1, "f1": 1}),
        ("Mill Roat", "Mill Road", {"exact": 0, "anls": pytest.approx(8 / 9), "relaxed": 0, "f1": 0}),
        ("104", "100", {"exact": 0, "anls": pytest.approx(2 / 3), "relaxed": 1, "f1": 0}),
        ("", "None", {"exact": 0, "anls": 0, "relaxed": 0, "f1": 1}),
    ],
)
def test_the_score_of_one_answer(predicted, expected, scores):
    (answer,) = answers((predicted, expected))
    assert {name: metric.score_of(answer) for name, metric in METRICS.items()} == scores


def test_f1_counts_values_of_all_documents():
    """A value that is not there and is given is one error; one that is there and is not given is another."""
    first = answers(("a", "a"), ("None", "b"), ("c", "None"))
    second = answers(("x", "x"), ("", "None"), document="e")
    score = METRICS["f1"].score(first + second)
    # 2 right of 3 given and 3 expected values; the interval is over two documents.
    assert score.value == pytest.approx(2 * 2 / (3 + 3)) and score.count == 2
    assert score.interval == pytest.approx((0.5, 1.0))


def test_exact_match_has_the_table_of_a_report():
    report = Report(answers(("a", "a"), ("b", "c"), ("d", "d")), (), "none", 1.0)
    assert format_scores(report, ["exact"]) == format_table({"exact match": report})
