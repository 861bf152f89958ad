"""The table beside the paper's."""

import types

import pytest

from alignvlm_jax.evaluation.benchmarks import summary
from alignvlm_jax.evaluation.benchmarks.paper import AVERAGE, AVERAGED, PAPER
from alignvlm_jax.evaluation.benchmarks.scores import Score, Scores
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS


def outcomes(names):
    return [
        types.SimpleNamespace(benchmark=BENCHMARKS[name], split="test", scores=Scores(Score("x", i / 10, None, 7)))
        for i, name in enumerate(names)
    ]


def test_the_average_stands_under_all_nine_and_the_papers_beside():
    found = outcomes([*AVERAGED, "vcr_en_easy"])
    assert summary.average_of_nine(found) == pytest.approx(40)
    last = summary.format_table(found).splitlines()[-1].split()
    assert last == ["average", "of", "the", "nine", "40.00", "52.14", "58.81", "62.88", "53.06", "50.68", "54.72"]


def test_the_papers_average_is_its_nine_scores():
    for model, average in AVERAGE.items():
        assert sum(PAPER[name][model] for name in AVERAGED) / 9 == pytest.approx(average, abs=0.01)


def test_no_average_of_fewer():
    assert summary.average_of_nine(outcomes(AVERAGED[1:])) is None
    assert "average" not in summary.format_table(outcomes(AVERAGED[1:]))
