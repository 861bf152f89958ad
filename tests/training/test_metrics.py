"""What is logged of several steps is what one would compute from all of them together."""

import math

import pytest

from alignvlm_jax.training import metrics

STEPS = [
    {
        "loss": 1.0,
        "weight": 10.0,
        "tokens": 100.0,
        "tiles": 4.0,
        "effective_tokens": 8.0,
        "grad_norm": 1.0,
        "refused": 1.0,
    },
    {
        "loss": 3.0,
        "weight": 30.0,
        "tokens": 300.0,
        "tiles": 0.0,
        "effective_tokens": 0.0,
        "grad_norm": 2.0,
        "refused": 2.0,
    },
]


def test_means_are_weighted_by_what_they_are_means_of():
    summary = metrics.averages(STEPS)
    assert summary["loss"] == pytest.approx(2.5)  # by answer tokens
    assert summary["effective_tokens"] == pytest.approx(8.0)  # by tiles
    assert summary["grad_norm"] == pytest.approx(1.5)
    assert summary["refused"] == 3.0


def test_speeds_are_sums_over_time():
    assert metrics.speeds(STEPS, 2.0) == {
        "tokens_per_second": 200.0,
        "tiles_per_second": 2.0,
        "steps_per_second": 1.0,
    }
    assert math.isnan(metrics.speeds([], 2.0)["tokens_per_second"])


def test_compilation_does_not_count_as_speed(tmp_path):
    log = metrics.MetricsLog(tmp_path, first_step=0)
    log.add(STEPS[0])
    log.restart_clock()
    assert math.isnan(log.write(1, 0)["tokens_per_second"])
    log.add(STEPS[1])
    assert log.write(2, 0)["tokens_per_second"] > 0
    assert log.write(2, 0) == {}, "nothing new"
    log.close()


def test_the_line_leaves_out_what_there_is_not():
    summary = {
        **metrics.averages(STEPS),
        **metrics.speeds(STEPS, 1.0),
        "token_fraction": 0.5,
        "learning_rate/vision": 1e-3,
    }
    line = metrics.line(7, "captions", summary)
    assert line.startswith("step 7 captions | loss 2.5000") and "400 tokens/s" in line and "words per patch 8.0" in line
    assert "3 examples refused" in line and "lr 1.0e-03" in line
    quiet = metrics.line(7, "captions", {**summary, "effective_tokens": math.nan, "refused": 0.0})
    assert "words per patch" not in quiet and "refused" not in quiet
