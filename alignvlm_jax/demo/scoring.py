"""Runs evaluations and keeps their results in files, so that a repeated demo does not run them again."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic import HELD_OUT_FONT
from alignvlm_jax.demo.output import show
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.report import Answer, Report
from alignvlm_jax.inference.reader import Reader


def score_once(
    name: str,
    make_reader: Callable[[], Reader],
    *,
    key: str,
    records: store.RecordSource,
    out: pathlib.Path,
    control: runner.Control = "none",
) -> Report:
    """Runs an evaluation, or reads the result of an earlier one with the same `key`.

    Args:
      name: name of the evaluation and of its files.
      make_reader: loads the model; called only if the evaluation runs.
      key: hash that identifies the model and the data; see `make_key`.
      records: the documents to ask about.
      out: folder of the result files.
      control: replaces the pages with blank or wrong ones.
    """
    result_file, answers_file = out / f"{name}.json", out / f"{name}.jsonl"
    if result_file.is_file() and (past := json.loads(result_file.read_text()))["key"] == key:
        report = Report(_read_answers(answers_file), (HELD_OUT_FONT,), control, past["seconds"])
    else:
        report = runner.evaluate(
            make_reader(), records, control=control, unseen_fonts=(HELD_OUT_FONT,), title=f"scoring, {name}"
        )
        runner.write_predictions(report, answers_file)
        # Write this file last, because answers without it do not count as complete.
        runner.write_json({"key": key, **report.to_json()}, result_file)
    show(f"{name}: {report.overall.right} of {report.overall.total} right")
    return report


def make_key(*values) -> str:
    """Returns a short hash of the values, which are compared by their JSON text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read_answers(file: pathlib.Path) -> list[Answer]:
    # A line of predictions also has derived values, which are not fields of Answer.
    names = {field.name for field in dataclasses.fields(Answer)}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answers = [Answer(**{name: value for name, value in line.items() if name in names}) for line in lines]
    return [dataclasses.replace(answer, warnings=tuple(answer.warnings)) for answer in answers]  # JSON has no tuples.
