"""Tests of the intervals over seeds and pages."""

import numpy as np
import pytest
from scipy import stats

from alignvlm_jax.reproduce.statistics import Estimate, estimate, verdict


def test_one_seed_one_question_a_page_is_students_interval():
    values = np.random.default_rng(0).normal(size=(1, 40))
    interval = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    found = estimate(values, [1] * 40)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.mean, found.seeds, found.questions) == (pytest.approx(values.mean()), 1, 40)


def test_questions_of_a_page_count_as_one_draw():
    page_values = np.random.default_rng(1).normal(size=(1, 30))
    once, thrice = estimate(page_values, [1] * 30), estimate(np.repeat(page_values, 3, axis=1), [3] * 30)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_seeds_that_agree_change_nothing_and_seeds_that_differ_widen_the_interval():
    values = np.random.default_rng(2).random((1, 50)) < 0.5
    one, same = estimate(values, [1] * 50), estimate(np.repeat(values, 3, axis=0), [1] * 50)
    assert (same.low, same.high) == pytest.approx((one.low, one.high))
    # With equal pages, only Student's interval of the seeds' means remains, with two degrees of freedom.
    differing = np.repeat([[0.2], [0.5], [0.9]], 50, axis=1)
    interval = stats.ttest_1samp([0.2, 0.5, 0.9], 0).confidence_interval(0.95)
    found = estimate(differing, [1] * 50)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_intervals_contain_the_truth_in_about_95_percent_of_cases():
    rng, hits, rounds = np.random.default_rng(3), 0, 400
    for _ in range(rounds):
        pages = np.repeat(rng.normal(0, 1, 40), 3)
        values = rng.normal(0, 0.3, (3, 1)) + pages + rng.normal(0, 1, (3, 120))
        found = estimate(values, [3] * 40)
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / rounds <= 0.995


def test_all_wrong_is_not_certainly_zero():
    found = estimate(np.zeros((3, 100)), [2] * 50)
    assert found.mean == found.low == 0.0
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 50))


def test_verdicts():
    assert verdict(Estimate(0.2, 0.1, 0.3, 3, 10)) == "Confirmed"
    assert verdict(Estimate(0.2, -0.1, 0.5, 3, 10)) == "Undecided"
    assert verdict(Estimate(-0.2, -0.3, -0.1, 3, 10)) == "Contradicted"
