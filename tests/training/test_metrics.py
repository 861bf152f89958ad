"""The summary of several steps equals the metrics of all their tokens and tiles together."""

import math

import pytest

from alignvlm_jax.parallel.chips import TPU_7X, TPU_V5E
from alignvlm_jax.training import metrics
from alignvlm_jax.training.flops import train_flops
from alignvlm_jax.training.tracking.trackers import Trackers
from tests.training.batches import MODEL, stage

CPU = metrics.Machine(num_chips=2)
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


def test_means_are_weighted():
    summary = metrics.averages(STEPS)
    assert summary["loss"] == pytest.approx(2.5)  # weighted by answer tokens
    assert summary["effective_tokens"] == pytest.approx(8.0)  # weighted by tiles
    assert summary["grad_norm"] == pytest.approx(1.5)
    assert summary["refused"] == 3.0


def test_speeds_are_sums_over_time():
    assert metrics.speeds(STEPS, 2.0, CPU) == {
        "tokens_per_second": 200.0,
        "tokens_per_second_per_chip": 100.0,
        "tiles_per_second": 2.0,
        "tiles_per_second_per_chip": 1.0,
        "steps_per_second": 1.0,
    }
    assert math.isnan(metrics.speeds([], 2.0, CPU)["tokens_per_second"])


def test_answers_are_shown_as_a_speed():
    steps = [{**step, "answers": 6.0} for step in STEPS]
    summary = metrics.averages(steps) | metrics.speeds(steps, 8.0, CPU)
    assert summary["answers_per_second"] == 1.5 and "answers" not in summary
    line = metrics.format_line(7, "a", {**summary, "token_fraction": 0.5})
    assert "50 tokens/s | 1.5 answers/s | 0.25 tiles/s a chip" in line


def test_mfu_is_the_models_flops_relative_to_the_peak():
    pod = metrics.Machine(num_chips=4, chip=TPU_V5E)
    summary = metrics.speeds(STEPS, 2.0, pod, lambda step: 1e15 * step["tiles"])
    assert summary["tflops_per_second_per_chip"] == pytest.approx(4000 / 2 / 4)
    assert summary["mfu"] == pytest.approx(500 / 197)
    summary = metrics.speeds(STEPS, 2.0, CPU, lambda step: 1e15 * step["tiles"])
    assert summary["tflops_per_second_per_chip"] == pytest.approx(1000) and "mfu" not in summary
    assert math.isnan(metrics.speeds([], 2.0, pod, lambda step: 1.0)["mfu"])


def test_the_flops_of_a_step_come_from_its_metrics():
    stage_3 = stage(trainable=("connector", "language"))
    step = {"tiles": 3.0, "tokens": 60.0, "answer_tokens": 7.0, "squared_lengths": 1300.0}
    expected = train_flops(MODEL, stage_3.trainable, tiles=3, tokens=60, answer_tokens=7, squared_lengths=1300)
    assert metrics.step_flops(MODEL, stage_3)(step) == expected.total > 0


def test_a_chip_may_be_two_devices():
    class Device:
        def __init__(self, device_kind):
            self.device_kind = device_kind

    # JAX shows each TPU7x chip as two devices.
    assert metrics.Machine.from_devices([Device("TPU7x")] * 8) == metrics.Machine(4, TPU_7X)
    assert metrics.Machine.from_devices([Device("TPU v5 lite")] * 8) == metrics.Machine(8, TPU_V5E)
    assert metrics.Machine.from_devices([Device("cpu")] * 8) == metrics.Machine(8, None)


def test_compilation_time_does_not_count_in_speeds():
    log = metrics.MetricsLog(Trackers({}), machine=CPU)
    log.add(STEPS[0])
    log.restart_clock()
    assert math.isnan(log.write(1, 0)["tokens_per_second"])
    log.add(STEPS[1])
    assert log.write(2, 0)["tokens_per_second"] > 0
    assert log.write(2, 0) == {}, "no step was added since the last summary"


def test_the_log_line_omits_missing_metrics():
    summary = {
        **metrics.averages(STEPS),
        **metrics.speeds(STEPS, 1.0, metrics.Machine(4, TPU_V5E), lambda step: 1e12 * step["tokens"]),
        "token_fraction": 0.5,
        "learning_rate/vision": 1e-3,
    }
    line = metrics.format_line(7, "captions", summary)
    assert line.startswith("step 7 captions | loss 2.5000") and "400 tokens/s" in line and "words per patch 8.0" in line
    assert "1 tiles/s a chip | 100 TFLOP/s a chip, MFU 50.8 % |" in line
    assert "3 examples refused" in line and "lr 1.0e-03" in line
    quiet = metrics.format_line(7, "captions", {**summary, "effective_tokens": math.nan, "refused": 0.0})
    assert "words per patch" not in quiet and "refused" not in quiet
    waiting = metrics.format_line(7, "a", {**summary, "data_wait": 0.12})
    assert "waiting" not in line and "12 % of the time waiting" in waiting
    del summary["mfu"]
    assert "100 TFLOP/s a chip | bins" in metrics.format_line(7, "captions", summary)


def test_data_wait_is_a_fraction_of_the_time():
    steps = [{"tokens": 1.0, "data_seconds": seconds} for seconds in (0.1, 0.3)]
    assert metrics.speeds(steps, 8.0, metrics.Machine(1, None))["data_wait"] == 0.05
    assert "data_wait" not in metrics.speeds([{"tokens": 1.0}], 8.0, metrics.Machine(1, None))
