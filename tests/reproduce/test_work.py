"""Tests of complete jobs, from training to the report, with a tiny model. Every job compiles, so they take minutes."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from alignvlm_jax.reproduce import parts, recipe, scheduler, work
from alignvlm_jax.reproduce.jobs import COMPLETE, OVER_TIME, read_result
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.parts import names
from alignvlm_jax.reproduce.report import write_report
from tests.reproduce.tiny import make_options

pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Options, pathlib.Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return make_options(folder), folder


@pytest.fixture
def options(shared) -> Options:
    return shared[0]


@pytest.fixture
def out(shared, tmp_path) -> pathlib.Path:
    """Fresh output folder that contains the data."""
    (tmp_path / "data").symlink_to(shared[1] / "data")
    return tmp_path


@pytest.fixture(autouse=True)
def one_trial(monkeypatch):
    monkeypatch.setattr(recipe, "RATE_FACTORS", (1.0,))


def run_job(options, out, job) -> dict:
    work.run_job(work.Work(options, out, job), parts.named(job.part).run)
    return read_result(out, job)


def test_tuning_and_the_main_run(options, out):
    options = dataclasses.replace(options, connectors=("mlp",))
    tuning, main = parts.all_jobs(options, ["accuracy"])
    trial = run_job(options, out, tuning)
    assert trial["status"] == COMPLETE and trial["validation_loss"] > 0
    result = run_job(options, out, main)
    assert (result["status"], result["steps"], result["pages"]) == (COMPLETE, 4, 32)
    assert [step for step, _ in result["curve"]] == [1, 2, 3, 4]
    assert set(result["parameters"]) == {"vision", "connector", "language"}
    heldout = result["found"]["heldout"]
    assert len(heldout["right"]) == sum(heldout["questions"]) == 6
    assert result["config"]["model"]["connector"] == {"name": "mlp"}
    assert "| MLP |" in write_report(options, out).read_text()
    # The result is small enough to commit.
    assert (main.folder(out) / "result.json").stat().st_size < 20_000


def test_parts_that_build_on_a_run(options, out):
    """Covers the other parts of one connector, on the run of the main table."""
    options = dataclasses.replace(options, connectors=("align",))
    for job in parts.all_jobs(options, ["noise", "vocabulary", "restoration", "cost"]):
        assert run_job(options, out, job)["status"] == COMPLETE
    text = write_report(options, out).read_text()
    for plot in ("noise", "vocabulary", "restoration"):
        assert (out / f"{plot}.svg").is_file() and f"({plot}.svg)" in text
    assert "nan" not in text


def test_a_run_past_its_minutes_is_marked_and_can_be_resumed(options, out):
    tuning = parts.all_jobs(options, ["tuning"])[1]
    stopped = run_job(dataclasses.replace(options, minutes=1e-6), out, tuning)
    assert (stopped["status"], stopped["steps"]) == (OVER_TIME, 1)
    result = run_job(options, out, tuning)
    assert (result["status"], result["steps"]) == (COMPLETE, result["steps_asked"])


def test_all_parts_with_one_process_killed(options, out):
    """Covers all parts in the command's own processes, the first of which is killed during training."""
    options.save(out)
    names.build(out / "data", options.seeds)
    jobs = parts.all_jobs(options)
    trial = jobs[0]
    folder = trial.folder(out)
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(scheduler.worker_command(out, trial, 1), stdout=log, stderr=log)
        while not (folder / work.CURVE_FILE).exists():
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert read_result(out, trial) is None
    assert scheduler.run_all(options, out, jobs) == []
    results = [read_result(out, job) for job in jobs]
    assert {result["status"] for result in results} == {COMPLETE}
    text = write_report(options, out).read_text()
    assert "missing" not in text and "nan" not in text
    stamps = {job: (job.folder(out) / "result.json").stat().st_mtime_ns for job in jobs}
    assert scheduler.run_all(options, out, jobs) == []
    assert stamps == {job: (job.folder(out) / "result.json").stat().st_mtime_ns for job in jobs}


def test_a_worker_ends_when_its_parent_is_killed(options, out):
    options.save(out)
    trial = parts.all_jobs(options)[0]
    trial.folder(out).mkdir(parents=True)
    starter = (
        "import subprocess, sys, json; process = subprocess.Popen(json.loads(sys.argv[1]));"
        "print(process.pid, flush=True); process.wait()"
    )
    command = json.dumps(scheduler.worker_command(out, trial, 1))
    with subprocess.Popen([sys.executable, "-c", starter, command], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        time.sleep(1)
        process.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise AssertionError(f"process {worker} is still running")
