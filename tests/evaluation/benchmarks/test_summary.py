"""Tests of the printed table and its comparison with the paper."""

import json
import shutil

import pytest

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.evaluation.benchmarks import summary
from alignvlm_jax.evaluation.benchmarks.outcome import Outcome
from alignvlm_jax.evaluation.benchmarks.paper import AVERAGE, AVERAGED, FOUR, GENERAL, LOW_RESOURCE, PAPER
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS
from alignvlm_jax.evaluation.identity import is_pruned
from alignvlm_jax.evaluation.scores import Score, Scores


def make_outcomes(names):
    """Returns outcomes of benchmarks with the scores 0, 10, 20, ..."""
    return [
        Outcome(BENCHMARKS[name], "test", [], {}, {}, Scores(Score("x", i / 10, None, 7)), None, 0.0)
        for i, name in enumerate(names)
    ]


def test_the_average_of_all_nine_is_the_last_row_with_the_papers():
    outcomes = make_outcomes([*AVERAGED, "vcr_en_easy"])
    assert summary.average_of(AVERAGED, outcomes) == pytest.approx(40)
    last = summary.format_table(outcomes).splitlines()[-1].split()
    assert last == ["average", "of", "the", "nine", "40.00", "52.14", "58.81", "62.88", "53.06", "50.68", "54.72"]


def test_the_papers_average_is_that_of_its_nine_scores():
    for model, average in AVERAGE.items():
        assert sum(PAPER[name][model] for name in AVERAGED) / 9 == pytest.approx(average, abs=0.01)


def test_fewer_benchmarks_have_no_average():
    assert summary.average_of(AVERAGED, make_outcomes(AVERAGED[1:])) is None
    assert "average" not in summary.format_table(make_outcomes(AVERAGED[1:]))


def test_a_pruned_model_is_compared_with_the_papers_pruned_one():
    table = summary.format_table(make_outcomes(AVERAGED), pruned=True).splitlines()
    assert table[0].endswith("ALIGN 3B pruned") and "79.40" in table[1] and table[-1].endswith("58.69")
    assert "79.40" not in summary.format_table(make_outcomes(AVERAGED))


def test_scores_of_other_models_are_marked():
    outcomes = make_outcomes(["mmvet", "docvqa", "vcr_en_easy"])
    table, notes = summary.format_table(outcomes), summary.format_notes(outcomes).splitlines()[1:]
    assert "35.32*" in table and "79.63*" not in table and "65.84**" in table
    assert [note[:6] for note in notes] == ["* scor", "  aver", "** sco"]
    assert "low-resource" in notes[0] and "ALIGN 56.88, MLP 53.59" in notes[1]
    assert "low-resource" in summary.to_json(outcomes[0])["paper_note"]
    assert summary.to_json(outcomes[1])["paper_note"] is None and not summary.format_notes(outcomes[1:2])


def test_the_average_of_four_is_compared_with_the_low_resource_models():
    notes = summary.format_notes(make_outcomes(FOUR))
    assert "15.00; the paper's low-resource models" in notes and "ALIGN 59.32, MLP 40.61" in notes
    paper_average = sum(PAPER[name]["ALIGN 3B"] for name in GENERAL) / 5
    assert LOW_RESOURCE[GENERAL]["ALIGN"] == pytest.approx(paper_average, abs=0.01)


@pytest.mark.parametrize("kept_words", [None, 3])
def test_pruned_checkpoints_are_detected(tmp_path, kept_words):
    config = json.loads((NANO_MODEL / "config.json").read_text())
    config["connector_config"]["kept_words"] = kept_words
    folder = tmp_path / "model"
    shutil.copytree(NANO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    assert is_pruned(folder) == bool(kept_words) and not is_pruned("nano")
