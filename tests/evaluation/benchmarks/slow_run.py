"""A benchmark run with a slow reader, for tests that kill it: `python slow_run.py DATA PREDICTIONS`."""

import pathlib
import sys
import time

from alignvlm_jax.evaluation.benchmarks import runner
from alignvlm_jax.evaluation.benchmarks.predictions import Predictions
from alignvlm_jax.evaluation.benchmarks.reading import read_questions
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS
from tests.evaluation.benchmarks.stub import StubReader

IDENTITY = {"checkpoint": "stub", "step": 3}


def main(data: str, predictions_file: str) -> None:
    """Answers ChartQA's questions at 20 per second."""
    runner._QUESTIONS_AT_ONCE = 2

    def answer(text: str) -> str:
        time.sleep(0.05)
        return text[-1]

    benchmark = BENCHMARKS["chartqa"]
    questions = read_questions(benchmark, pathlib.Path(data), "test", allow_partial=True)
    reader = StubReader(answer)
    reader.generator.batch_size = 1
    with Predictions(predictions_file) as predictions:
        runner.run(benchmark, "test", questions, lambda: reader, predictions, IDENTITY)


if __name__ == "__main__":
    main(*sys.argv[1:])
