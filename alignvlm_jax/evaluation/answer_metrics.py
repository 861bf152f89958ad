"""Metrics of a user's own data set, where every question has one expected answer.

    exact     the same text
    anls      ANLS, as of DocVQA: near misses count in part
    relaxed   relaxed accuracy, as of ChartQA: numbers within 5 %
    f1        F1 over the values of all documents, as of DeepForm, with the question as the key

Spaces at the ends of answers do not count. Intervals are those of `scores.py`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alignvlm_jax.config.building import join_names, suggestion
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import metrics
from alignvlm_jax.evaluation.report import Answer, Report, format_interval, format_rows
from alignvlm_jax.evaluation.scores import Score, f1, mean

# Answer for a value that the document does not have.
_NO_VALUE = ("", "None")


@dataclasses.dataclass(frozen=True)
class AnswerMetric:
    """A metric of answers.

    Attributes:
      title: title of its column.
      score_one: score from 0 to 1 of one answer, given the predicted and the expected text.
      score_many: score of many answers.
    """

    title: str
    score_one: Callable[[str, str], float]
    score_many: Callable[[str, Sequence[Answer]], Score]

    def score_of(self, answer: Answer) -> float:
        """Returns the score of one answer."""
        return self.score_one(answer.predicted.strip(), answer.expected.strip())

    def score(self, answers: Sequence[Answer]) -> Score:
        """Returns the score of many answers."""
        return self.score_many(self.title, answers)


def _mean_of(title: str, score_one: Callable[[str, str], float]) -> AnswerMetric:
    """Returns a metric whose score is the mean over the answers."""

    def score_many(name: str, answers: Sequence[Answer]) -> Score:
        return mean(name, [score_one(answer.predicted.strip(), answer.expected.strip()) for answer in answers])

    return AnswerMetric(title, score_one, score_many)


def _exact(predicted: str, expected: str) -> float:
    return float(predicted == expected)


def _same_value(predicted: str, expected: str) -> float:
    given, wanted = _values("", predicted), _values("", expected)
    return metrics.due_f1([given], [wanted]) if given or wanted else 1.0


def _values(key: str, text: str) -> list[tuple[str, str]]:
    return [] if text in _NO_VALUE else [(key, text)]


def _f1_of_documents(name: str, answers: Sequence[Answer]) -> Score:
    documents = defaultdict(lambda: ([], []))
    for answer in answers:
        predicted, expected = documents[answer.document]
        predicted += _values(answer.question, answer.predicted.strip())
        expected += _values(answer.question, answer.expected.strip())
    return f1(name, list(documents.values()))


METRICS = {
    "exact": _mean_of("exact match", _exact),
    "anls": _mean_of("ANLS", metrics.anls),
    "relaxed": _mean_of("relaxed accuracy", metrics.relaxed_accuracy),
    "f1": AnswerMetric("F1", _same_value, _f1_of_documents),
}


def check_metrics(names: Iterable[str]) -> None:
    """Checks the names of metrics.

    Raises:
      UserError: if one is unknown.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(
                f"--metric {name}: expected one or more of {join_names(METRICS)}{suggestion(name, METRICS)}"
            )


def format_scores(report: Report, names: Sequence[str]) -> str:
    """Returns a table with a column per metric, and rows for each family, the unseen fonts and all questions."""
    columns = [METRICS[name] for name in names]
    rows = {
        group: (len(answers), [format_interval(score.value, score.interval) for score in _scores(columns, answers)])
        for group, answers in report.groups.items()
    }
    return format_rows([metric.title for metric in columns], rows)


def scores_to_json(report: Report, names: Sequence[str]) -> dict[str, Any]:
    """Returns the score of each metric from 0 to 1, its interval and its count, for all questions and each group."""
    groups = {group: answers for group, answers in report.groups.items() if group != "all"}
    return {
        name: {
            **_to_json(METRICS[name].score(report.answers)),
            "per_group": {group: _to_json(METRICS[name].score(answers)) for group, answers in groups.items()},
        }
        for name in names
    }


def answer_scores(answer: Answer, names: Sequence[str]) -> dict[str, float]:
    """Returns the score of one answer by each metric."""
    return {name: round(METRICS[name].score_of(answer), 4) for name in names}


def _scores(columns: Sequence[AnswerMetric], answers: Sequence[Answer]) -> list[Score]:
    return [metric.score(answers) for metric in columns]


def _to_json(score: Score) -> dict[str, Any]:
    interval = None if score.interval is None else [round(bound, 4) for bound in score.interval]
    return {"score": round(score.value, 4), "interval_95": interval, "count": score.count}
