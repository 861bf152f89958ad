"""Tests of benchmarks with parts that are missing or present twice."""

import json

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import summary
from alignvlm_jax.evaluation.benchmarks.mmmu import SUBJECTS
from alignvlm_jax.evaluation.benchmarks.reading import read_questions
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS
from tests.evaluation.benchmarks.stub import cell, evaluate, write_image, write_json, write_parquet

CHART = {"type": "human_test", "question": "How many?", "answer": "14", "image": cell(1)}
PAGE = {"question": "What is it?", "image": cell(2), "answers": ["x"]}


def test_a_missing_shard(tmp_path):
    """PKU-YuanGroup/ImgEdit#3: some of the Parquet files are not there."""
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", [CHART, {**CHART, "type": "augmented_test"}])
    with pytest.raises(UserError, match="1 of 2 shards is missing, test-00001-of-00002.parquet.*--allow-partial"):
        evaluate("chartqa", tmp_path, lambda text: "14")
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: "14", allow_partial=True)
    assert "[34.2-100.0] (partial)   65.44" in summary.format_table([outcome])
    notes = summary.format_notes([outcome])
    assert "the score is over a part of the benchmark" in notes and "test-00001-of-00002" in notes
    figures = json.loads(json.dumps(summary.to_json(outcome)))
    assert figures["is_partial"] and "test-00001-of-00002" in figures["remarks"][0]
    assert figures["remarks"][1] == "number of questions in the files: 2, published for the split test: 2,500"
    assert figures["num_published"] == [2500]


def test_missing_parts_are_named(tmp_path):
    """stanford-crfm/helm#1335: 5 of 57 subjects stood for all; OpenGVLab/InternVL#221: which half of ChartQA."""
    accounting = {"id": "validation_Accounting_1", "question": "<image 1> How many?", "options": "['10', '20']"}
    accounting |= {"answer": "A", "question_type": "multiple-choice", "image_1": cell(1)}
    write_parquet(tmp_path / "mmmu" / "Accounting" / "validation-00000-of-00001.parquet", [accounting], ("image_1",))
    with pytest.raises(UserError, match="29 of MMMU's subjects are missing .of 30.: Agriculture, Architecture_and_"):
        evaluate("mmmu", tmp_path / "mmmu", lambda text: "A")
    assert len(SUBJECTS) == 30 == BENCHMARKS["mmmu"].published["val"][0] / 30

    write_image(tmp_path / "test" / "png" / "1.png", 1)
    write_json(tmp_path / "test" / "test_human.json", [{"imgname": "1.png", "query": "?", "label": "10"}])
    with pytest.raises(UserError, match="one of ChartQA's two halves is missing, test_augmented.json"):
        evaluate("chartqa", tmp_path, lambda text: "10")
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: "10", allow_partial=True, limit=1)
    assert outcome.scores.primary.value == 1 and outcome.missing


@pytest.mark.parametrize("hashes", [False, True])
def test_two_uploads_of_one_split(hashes, tmp_path):
    """open-compass/VLMEvalKit#345: the questions of both uploads would count."""
    rows = [{"questionId": str(i), **PAGE} for i in range(4)]
    names = ["validation-00000-of-00001", "validation-00000-of-00002", "validation-00001-of-00002"]
    parts = [rows, rows[:2], rows[2:]]
    if hashes:
        names, parts = [f"validation-00000-of-00001-{c * 16}" for c in "ab"], [rows, rows]
    for name, part in zip(names, parts, strict=True):
        write_parquet(tmp_path / "DocVQA" / f"{name}.parquet", part)
    with pytest.raises(UserError, match="side by side, validation-.*of-00001.* and validation-.*; remove one of them"):
        evaluate("docvqa", tmp_path, lambda text: "x")
    outcome, _ = evaluate("docvqa", tmp_path, lambda text: "x", allow_partial=True)
    assert outcome.scores.primary.value == 1 and len(outcome.questions) == 4 and not outcome.problems


def test_an_average_over_a_partial_score_is_marked(tmp_path):
    write_parquet(tmp_path / "test-00000-of-00002.parquet", [CHART])
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: "14", allow_partial=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "AVERAGED", ("chartqa",))
        assert "100.00 (partial)" in summary.format_table([outcome]).splitlines()[-1]


def test_a_pointer_is_not_a_damaged_file(tmp_path):
    """huggingface/datasets: a clone without Git LFS has pointers in place of the Parquet files."""
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="test-00000-of-00001.parquet: .* a Git LFS pointer, .* `git lfs pull`"):
        evaluate("chartqa", tmp_path, lambda text: "14")


def test_every_benchmark_has_a_published_number_of_questions():
    """Publishers' pages; docs/benchmarks.md lists them."""
    for benchmark in BENCHMARKS.values():
        assert benchmark.published[benchmark.split], benchmark.name


def test_the_published_number_of_questions_needs_no_remark(tmp_path, monkeypatch):
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [CHART])
    monkeypatch.setitem(BENCHMARKS["chartqa"].published, "test", (1, 2500))
    assert not read_questions(BENCHMARKS["chartqa"], tmp_path, "test").remarks
