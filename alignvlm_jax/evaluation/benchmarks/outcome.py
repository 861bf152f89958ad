"""The result of one benchmark run, before it is printed or written."""

import dataclasses

from alignvlm_jax.evaluation.benchmarks.question import Question
from alignvlm_jax.evaluation.benchmarks.table import Benchmark
from alignvlm_jax.evaluation.scores import Scores


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Answers to the questions of one benchmark, and their scores.

    Attributes:
      benchmark: row of the table of benchmarks.
      split: name of the split.
      questions: selected questions, in the order of the files.
      answers: answer by question id; None if the question could not be asked.
      problems: reason by question id, for the questions that could not be asked.
      scores: scores of the answers; None if the benchmark withholds its references.
      limit: maximum number of questions to ask; None for all.
      warnings: number of answers with each kind of warning (`inference/answers.py`).
      seconds: time this run took to answer the questions that had no stored answer.
      missing: one sentence for each part of the benchmark that was not there.
      remarks: other differences from the published benchmark.
    """

    benchmark: Benchmark
    split: str
    questions: list[Question]
    answers: dict[str, str | None]
    problems: dict[str, str]
    scores: Scores | None
    limit: int | None
    seconds: float
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: dict[str, int] = dataclasses.field(default_factory=dict)
