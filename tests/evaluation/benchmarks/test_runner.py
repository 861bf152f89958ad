"""Tests of stopped and resumed runs, of refused commands, and of the shipped model on generated pages."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from alignvlm_jax import cli
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import reading, runner
from alignvlm_jax.evaluation.benchmarks.predictions import Predictions
from alignvlm_jax.evaluation.benchmarks.question import Question
from alignvlm_jax.evaluation.benchmarks.reading import read_questions
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS, find_benchmarks
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.clients import file_system
from tests.evaluation.benchmarks import slow_run
from tests.evaluation.benchmarks.drawn import write_docdownstream
from tests.evaluation.benchmarks.stub import StubReader, cell, evaluate, write_image, write_json, write_parquet

CHARTQA = BENCHMARKS["chartqa"]
NUMBER = 200


@pytest.fixture
def charts(tmp_path) -> pathlib.Path:
    """ChartQA with numbered questions, each answered by its last digit."""
    folder = tmp_path / "charts"
    for i in range(2):
        write_image(folder / "test" / "png" / f"{i}.png", i)
    records = [{"imgname": f"{i % 2}.png", "query": f"question {i}", "label": str(i % 10)} for i in range(NUMBER)]
    write_json(folder / "test" / "test_human.json", records)
    return folder


def run_or_resume(
    charts, file, *, benchmark=CHARTQA, identity=slow_run.IDENTITY, rule=lambda text: text[-1], **options
):
    """Runs a benchmark with a file of predictions; returns the outcome and the stub that answered."""
    stub = StubReader(rule)
    questions = read_questions(benchmark, charts, "test", allow_partial=True)
    with Predictions(file) as predictions:
        return runner.run(benchmark, "test", questions, lambda: stub, predictions, identity, **options), stub


def test_a_killed_run_resumes_and_asks_no_question_twice(charts, tmp_path):
    file, root = tmp_path / "predictions.jsonl", pathlib.Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.evaluation.benchmarks.slow_run", str(charts), str(file)]
    with subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}) as process:
        deadline = time.monotonic() + 120
        while not file.exists() or file.read_bytes().count(b"\n") < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(UserError, match="another run is writing to it"):
            Predictions(file)
        process.send_signal(signal.SIGKILL)
    answered = file.read_bytes().count(b"\n") - 1
    assert 9 <= answered < NUMBER
    with file.open("ab") as torn:
        torn.write(b'{"benchmark": "chartqa", "id": "human:19')  # A crash during a write leaves a partial line.

    outcome, stub = run_or_resume(charts, file)
    assert len(stub.seen) == NUMBER - answered
    assert outcome.scores.primary.value == 1 and outcome.scores.primary.count == NUMBER
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 1 + NUMBER and len({line.get("id") for line in lines}) == 1 + NUMBER

    def nothing_left():
        raise AssertionError("the model is loaded without need")

    questions = read_questions(CHARTQA, charts, "test", allow_partial=True)
    with Predictions(file) as predictions:
        again = runner.run(CHARTQA, "test", questions, nothing_left, predictions, slow_run.IDENTITY)
    assert again.scores == outcome.scores


def test_a_higher_limit_asks_only_the_new_questions(charts, tmp_path):
    outcome, stub = run_or_resume(charts, tmp_path / "p.jsonl", limit=30)
    assert outcome.scores.primary.count == len(stub.seen) == 30
    outcome, stub = run_or_resume(charts, tmp_path / "p.jsonl")
    assert outcome.scores.primary.count == NUMBER and len(stub.seen) == NUMBER - 30


def test_questions_about_one_page_are_asked_together(tmp_path, monkeypatch):
    """Also if they do not follow each other, and if each row of a Parquet file has its own copy of the page."""
    pages = [1, 2, 1, 3, 2, 1]
    rows = [
        {"questionId": str(i), "question": f"{i}?", "image": cell(page), "answers": ["x"]}
        for i, page in enumerate(pages)
    ]
    write_parquet(tmp_path / "DocVQA" / "validation-00000-of-00001.parquet", rows)
    cut, num_cut = StubReader.cut, []
    monkeypatch.setattr(StubReader, "cut", lambda self, image: num_cut.append(1) or cut(self, image))
    outcome, stub = evaluate("docvqa", tmp_path, lambda text: text)
    assert stub.seen == ["[1]0?", "[1]2?", "[1]5?", "[2]1?", "[2]4?", "[3]3?"]
    assert list(outcome.answers.items()) == [(str(i), f"[{page}]{i}?") for i, page in enumerate(pages)]
    assert len(num_cut) == 3

    path, other = pathlib.Path("a.png"), pathlib.Path("b.png")
    questions = [Question(str(i), "", images=images) for i, images in enumerate([(path,), (other,), (path,), (), ()])]
    groups = [[question.id for question in group] for group in runner.groups_of_pages(questions, 1)]
    assert groups == [["0", "2"], ["1"], ["3"], ["4"]]


def test_answers_made_with_other_settings_are_refused(charts, tmp_path):
    file = tmp_path / "p.jsonl"
    run_or_resume(charts, file, limit=3)
    with pytest.raises(UserError, match="step was 3 and is 4.*Name another --predictions file"):
        run_or_resume(charts, file, identity={**slow_run.IDENTITY, "step": 4})
    with pytest.raises(UserError, match=r"prompt was '\{question\}' and is 'Q: \{question\}'"):
        run_or_resume(charts, file, benchmark=dataclasses.replace(CHARTQA, prompt="Q: {question}"))
    records = json.loads((charts / "test" / "test_human.json").read_text())
    write_json(charts / "test" / "test_human.json", [*records[:-1], {**records[-1], "label": "other"}])
    with pytest.raises(UserError, match="questions was"):
        run_or_resume(charts, file)
    file.write_text("what is this\n" + file.read_text())
    with pytest.raises(UserError, match="line 1 was not written by"):
        run_or_resume(charts, file)


def test_a_restored_image_is_asked_about_by_the_next_run(charts, tmp_path):
    lost = (charts / "test" / "png" / "1.png").rename(tmp_path / "lost.png")
    outcome, _ = run_or_resume(charts, tmp_path / "p.jsonl")
    assert len(outcome.problems) == NUMBER // 2 and outcome.scores.primary.value == 0.5
    lost.rename(charts / "test" / "png" / "1.png")
    outcome, stub = run_or_resume(charts, tmp_path / "p.jsonl")
    assert not outcome.problems and len(stub.seen) == NUMBER // 2 and outcome.scores.primary.value == 1


def test_bad_commands_are_refused_at_once(tmp_path, capsys):
    with pytest.raises(UserError, match="unknown benchmark 'docqva'. Available: docvqa, infovqa"):
        find_benchmarks(["docvqa", "docqva"])
    assert cli.main(["eval", "--checkpoint", "nano", "--benchmark", "docvqa"]) == 2
    assert "lmms-lab/DocVQA is not in the cache, and HF_HUB_OFFLINE is set" in capsys.readouterr().err
    for empty in ("", " ,"):
        assert cli.main(["eval", "--checkpoint", "nano", "--benchmark", empty]) == 2
        assert "--benchmark names no benchmark. Available: docvqa, infovqa" in capsys.readouterr().err
    command = ["eval", "--checkpoint", "nano", "--benchmark", "docvqa", "--data", str(tmp_path)]
    assert cli.main([*command, "--control", "blank"]) == 2
    assert cli.main(command) == 2
    assert "no files of DocVQA, split val. It has nothing. Expected files: DocDownstream-1.0" in capsys.readouterr().err


def test_a_repeated_id_is_a_problem(tmp_path):
    write_image(tmp_path / "images" / "a.png", 1)
    entry = {"imageId": "n1", "question": "?", "answer": "no"}
    write_json(tmp_path / "testdev_balanced_questions.json", {"1": entry})
    found = BENCHMARKS["gqa"].layouts[0].read(tmp_path, "test")
    unique = reading._unique([*found.questions] * 2)
    assert [bool(one.problem) for one in unique] == [False, True]


def test_parts_of_a_message():
    parts = runner.content("Is \ufffc like \ufffc?", 3)
    image = {"type": "image"}
    assert parts == [image, {"type": "text", "text": "Is "}, image, {"type": "text", "text": " like "}, image] + [
        {"type": "text", "text": "?"}
    ]
    with pytest.raises(UserError, match="has places for 2 images, got 1"):
        runner.content("\ufffc\ufffc", 1)


def test_every_row_of_the_table_can_be_asked(tmp_path):
    for benchmark in BENCHMARKS.values():
        kinds = [""] if isinstance(benchmark.prompt, str) else list(benchmark.prompt)
        for kind in kinds:
            prompt = benchmark.ask(Question("1", "here", "what {is} it?", kind=kind, choices=("yes", "{no}")))
            assert benchmark.name.startswith("vcr") or "what {is} it?" in prompt
        with pytest.raises(UserError, match=f"no files of .*{benchmark.split}"):
            evaluate(benchmark.name, tmp_path, lambda text: "")


def test_the_shipped_model_reads_generated_pages(tmp_path, capsys, gcs_bucket, monkeypatch):
    write_docdownstream(tmp_path / "data", tmp_path, pages=8)
    command = ["eval", "--checkpoint", "nano", "--benchmark", "docvqa,chartqa", "--data", str(tmp_path / "data")]
    assert cli.main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "ALIGN 3B" in printed and "79.63" in printed and "DocVQA val, ANLS" in printed
    figures = json.loads((tmp_path / "scores.json").read_text())
    docvqa, chartqa = figures["benchmarks"]
    # Random weights or wrong pages score below 10.
    assert docvqa["score"] > 60 and chartqa["score"] > 30
    assert docvqa["paper"]["ALIGN 3B"] == 79.63 and docvqa["prompt"] == "{question}"
    assert docvqa["num_not_asked"] == 0 and "jax" in figures["versions"]
    lines = (tmp_path / "scores.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 + docvqa["num_questions"] + chartqa["num_questions"]

    two_views = [*command, "--views", "2", "--limit", "3"]
    assert cli.main([*two_views, "--json", str(tmp_path / "scores.json")]) == 2
    assert "views was None and is 2" in capsys.readouterr().err
    assert cli.main([*two_views, "--json", str(tmp_path / "views.json")]) == 0
    figures = json.loads((tmp_path / "views.json").read_text())
    assert figures["views"] == 2 and figures["benchmarks"][0]["score"] > 30

    # The same in a bucket, where the second run finds all answers.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_system(gcs_bucket).put(f"{tmp_path}/data/", f"{gcs_bucket}/data/", recursive=True)
    command = ["eval", "--checkpoint", "nano", "--benchmark", "docvqa", "--data", f"{gcs_bucket}/data", "--limit", "2"]
    answers = open_location(gcs_bucket) / "scores.predictions.jsonl"
    assert cli.main([*command, "--json", f"{gcs_bucket}/scores.json"]) == 0
    assert answers.read_bytes().splitlines()[1:] == [line.encode() for line in lines[1:3]]
    monkeypatch.setattr("alignvlm_jax.evaluation.benchmarks.runner.load", None)
    assert cli.main([*command, "--json", f"{gcs_bucket}/scores.json"]) == 0
    assert json.loads((open_location(gcs_bucket) / "scores.json").read_bytes())["predictions"] == str(answers)
    assert not (tmp_path / "gs:").exists()


def test_the_docs_name_every_benchmark():
    text = (pathlib.Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text()
    for name, benchmark in BENCHMARKS.items():
        assert f"`{name}`" in text, name
        for layout in benchmark.layouts:
            for place in layout.name.partition("(")[2].rstrip(")").split(", "):
                assert place in text or place.startswith(("rrc", "vcr-org", "task")), place
