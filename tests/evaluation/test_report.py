"""Tests of the report: exact match, intervals against known values, and the table."""

import json
import math

import pytest

from alignvlm_jax.evaluation.report import Answer, Report, Tally, format_table


def answer(expected="12.50", predicted="12.50", family="receipt", font="A", document="d"):
    return Answer(document, family, font, "What is the total?", expected, predicted)


@pytest.mark.parametrize(("right", "total"), [(0, 20), (10, 20), (85, 100), (7, 7)])
def test_wilson_interval_ends_where_the_score_test_rejects(right, total):
    for end in Tally(right, total).interval:
        if 0 < end < 1:
            deviations = abs(right / total - end) / math.sqrt(end * (1 - end) / total)
            assert deviations == pytest.approx(1.96, abs=1e-3)
    assert Tally(85, 100).interval == pytest.approx((0.7672, 0.9069), abs=1e-4)
    assert Tally(0, 20).interval[0] == 0 and Tally(7, 7).interval[1] == 1


def test_no_questions_give_no_score():
    assert Tally(0, 0).to_json()["exact_match"] is None
    assert Tally(0, 0).interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("expected", "predicted", "right"),
    [
        ("12.50", "12.50", True),
        ("12.50", " 12.50\n", True),
        ("12.50", "12.5", False),
        ("Mill Road", "mill road", False),
        ("Mill Road", "Mill  Road", False),
        ("12.50", "", False),
    ],
)
def test_exact_match_ignores_spaces_at_the_ends_only(expected, predicted, right):
    assert answer(expected, predicted).is_right is right


def test_table_and_json_count_families_and_the_unseen_font():
    answers = [
        answer(),
        answer(predicted="?", document="e"),
        answer(family="form", font="B", document="f"),
        answer(family="form", predicted="?", font="B", document="f"),
        answer(family="form", document="g"),
    ]
    report = Report(answers, ("B",), "none", 1.26)
    blank = Report([answer(predicted="", family=a.family, font=a.font) for a in answers], ("B",), "blank", 1.0)
    lines = format_table({"held-out": report, "blank image": blank}).splitlines()
    assert lines[0].split() == ["questions", "held-out", "blank", "image"]
    assert [line.split()[0] for line in lines[1:]] == ["form", "receipt", "font", "all"]
    assert "0.60" in lines[-1] and "0.00" in lines[-1]
    figures = json.loads(json.dumps(report.to_json()))
    assert figures["exact_match"] == 0.6
    assert figures["num_questions"] == 5 and figures["num_documents"] == 4
    assert figures["per_family"]["form"]["num_right"] == 2
    assert figures["unseen_font"]["exact_match"] == 0.5 and figures["unseen_font"]["fonts"] == ["B"]
