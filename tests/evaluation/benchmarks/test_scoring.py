"""Tests of scores over all answers: ratios that are not a mean over questions, and damaged questions."""

import pytest

from alignvlm_jax.evaluation.benchmarks import scoring
from alignvlm_jax.evaluation.benchmarks.question import Question


def test_a_value_asked_for_on_two_pages_is_expected_once():
    questions = [
        Question("1", "", document="a", group="name", values=(("Anna",),)),
        Question("2", "", document="a", group="name", values=(("Anna",),)),
        Question("3", "", document="a", group="town", values=(("Rome",), ("Pisa",))),
    ]
    scores = scoring.forms(questions, {"1": "Anna", "2": "anna", "3": "Pisa"})
    # 2 of 3 predictions are right (the other is a duplicate), and 2 of 3 values are found.
    assert scores.primary.value == pytest.approx(2 / 3)


def test_a_question_without_ten_answers_counts_as_wrong_and_is_named():
    questions = [Question("1", "", references=("red",) * 10), Question("2", "", references=("red",) * 9)]
    scores = scoring.mean_of("VQA accuracy", scoring.vqa_accuracy)(questions, {"1": "red", "2": "red"})
    assert scores.primary.value == 0.5 and [id for id, _ in scores.aborted] == ["2"]
    questions = [Question("1", "", references=("red",)), Question("2", "", references=())]
    scores = scoring.mean_of("ANLS", scoring.anls)(questions, {"1": "red", "2": "red"})
    assert scores.primary.value == 0.5 and [id for id, _ in scores.aborted] == ["2"]


def test_an_image_without_covered_texts_does_not_count():
    questions = [Question("1", "", references=("red",)), Question("2", "", references=())]
    answers = {"1": "red", "2": "red"}
    assert scoring.vcr("en")(questions, answers).primary.value == 1
    unread = Question("3", "", problem="no row")
    assert scoring.vcr("en")([*questions, unread], {**answers, "3": None}).primary.value == 0.5
