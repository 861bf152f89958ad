"""Tests of the scheduler: order, failures, limits, signals. The processes only write results."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from alignvlm_jax.checkpoints import integrity
from alignvlm_jax.leases.lease import InUseError
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.parallel import distributed
from alignvlm_jax.reproduce import run, scheduler
from alignvlm_jax.reproduce.jobs import COMPLETE, OVER_TIME, RESULT_FILE, Job
from alignvlm_jax.reproduce.options import Options

OPTIONS = Options()

# Logs its start and end, and writes a result, after the given seconds and with the given exit code and status.
WORKER = """
import json, pathlib, sys, time
folder, log, seconds, code, status = sys.argv[1:]
name = "/".join(pathlib.Path(folder).parts[-4:])
note = lambda what: open(log, "a").write(f"{what} {name}\\n")
note("begins")
time.sleep(float(seconds))
note("ends")
if int(code) == 0:
    result = {"status": status, "minutes": 3.0, "steps": 7}
    pathlib.Path(folder, "result.json").write_text(json.dumps(result))
else:
    print("it broke")
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(scheduler, "_POLL_INTERVAL", 0.02)


def command(log: Path, seconds: float = 0.0, codes=None, statuses=None):
    """Returns a command factory for processes of this duration; `codes` and `statuses` are by connector."""

    def make_command(out: Path, job: Job, share: int) -> list[str]:
        code, status = (codes or {}).get(job.connector, 0), (statuses or {}).get(job.connector, COMPLETE)
        return [sys.executable, "-c", WORKER, str(job.folder(out)), str(log), str(seconds), str(code), status]

    return make_command


def read_log(log: Path) -> list[tuple[str, str]]:
    """Returns the logged events, each with the connector of its job."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(event, name.split("/")[2]) for event, name in lines]


def test_every_job_runs_once_and_after_its_needs(tmp_path):
    first, other = Job("p", "e", "first"), Job("p", "e", "other")
    jobs = [first, other, Job("p", "e", "last", needs=(first.name, other.name))]
    log = tmp_path / "log"
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, at_once=2, command=command(log)) == []
    done = read_log(log)
    assert sorted(done) == sorted((event, job.connector) for job in jobs for event in ("begins", "ends"))
    assert done[-2:] == [("begins", "last"), ("ends", "last")]
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log)) == []
    assert read_log(log) == done


def test_a_failure_is_reported_and_skips_only_the_jobs_that_need_it(tmp_path):
    bad = Job("p", "e", "bad")
    blocked = Job("p", "e", "blocked", needs=(bad.name,))
    jobs = [bad, blocked, Job("p", "e", "after", needs=(blocked.name,)), Job("p", "e", "good")]
    log = tmp_path / "log"
    problems = scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log, codes={"bad": 2}))
    assert problems[0].startswith(f"{bad.name}: failed with code 2: it broke")
    assert problems[1:] == [
        f"{blocked.name}: skipped, it needs {bad.name}",
        f"{jobs[2].name}: skipped, it needs {blocked.name}",
    ]
    assert read_log(log) == [("begins", "bad"), ("ends", "bad"), ("begins", "good"), ("ends", "good")]
    # The same call runs the failed and skipped jobs again, and no others.
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log)) == []
    assert [name for event, name in read_log(log)[4:] if event == "begins"] == ["bad", "blocked", "after"]


def test_done_jobs_are_repeated_only_if_their_weights_are_needed_and_gone(tmp_path):
    """A clone of the repository has the results of earlier runs, but not their weights."""
    trained, tuned = Job("p", "e", "trained"), Job("p", "e", "tuned")
    jobs = [tuned, trained, Job("p", "e", "noisy", needs=(trained.name,), needs_weights=True)]
    jobs.append(Job("p", "e", "after", needs=(tuned.name,)))
    log = tmp_path / "log"
    assert scheduler.run_all(OPTIONS, tmp_path, jobs[:2], command=command(log)) == []
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log)) == []
    starts = [name for event, name in read_log(log) if event == "begins"]
    assert starts == ["tuned", "trained", "trained", "noisy", "after"]
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log)) == [], "no weights are needed"
    assert len(read_log(log)) == 10
    # The run has 7 steps: a repetition that was stopped at step 3 starts again, a complete one does not.
    for step, expected in ((3, ["trained", "noisy"]), (7, ["noisy"])):
        (jobs[2].folder(tmp_path) / RESULT_FILE).unlink()
        weights = trained.workdir(tmp_path) / "checkpoints" / str(step)
        weights.mkdir(parents=True)
        integrity.seal(weights)
        before = len(read_log(log))
        assert scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log)) == []
        assert [name for event, name in read_log(log)[before:] if event == "begins"] == expected


def test_a_job_that_ran_out_of_time_is_repeated_only_under_a_higher_limit(tmp_path):
    slow = Job("p", "e", "slow")
    jobs = [slow, Job("p", "e", "after", needs=(slow.name,))]
    log = tmp_path / "log"
    for _ in range(2):
        problems = scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log, statuses={"slow": OVER_TIME}))
        assert problems == [
            f"{slow.name}: not done in 3 minutes, stopped at step 7",
            f"{jobs[1].name}: skipped, it needs {slow.name}",
        ]
    assert read_log(log) == [("begins", "slow"), ("ends", "slow")]
    assert scheduler.run_all(Options(minutes=4.0), tmp_path, jobs, command=command(log)) == []


def test_a_job_that_measures_time_has_the_machine_to_itself(tmp_path):
    jobs = [Job("p", "e", "one"), Job("p", "e", "alone", runs_alone=True), Job("p", "e", "two"), Job("p", "e", "three")]
    log = tmp_path / "log"
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, at_once=3, command=command(log, 0.1)) == []
    done = read_log(log)
    assert done.index(("ends", "alone")) == done.index(("begins", "alone")) + 1
    assert done.index(("ends", "one")) < done.index(("begins", "alone"))


def test_a_signal_while_a_process_starts_stops_it(tmp_path):
    start_process = command(tmp_path / "log", 60.0)

    def command_with_signal(out: Path, job: Job, share: int) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return start_process(out, job, share)

    start_time = time.monotonic()
    with pytest.raises(distributed.Preempted):
        scheduler.run_all(OPTIONS, tmp_path, [Job("p", "e", "one")], command=command_with_signal)
    assert time.monotonic() - start_time < 30


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, distributed.Preempted), (signal.SIGINT, distributed.Interrupted)]
)
def test_a_signal_stops_the_processes(tmp_path, number, error):
    jobs = [Job("p", "e", "one"), Job("p", "e", "two")]
    log = tmp_path / "log"

    def send_signal():
        while not read_log(log):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_signal, daemon=True).start()
    start_time = time.monotonic()
    with pytest.raises(error):
        scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log, 60.0))
    assert time.monotonic() - start_time < 30
    assert read_log(log) == [("begins", "one")]
    assert scheduler.run_all(OPTIONS, tmp_path, jobs, command=command(log)) == []


def test_a_second_comparison_in_the_same_folder_is_refused(tmp_path):
    with one_writer(tmp_path), pytest.raises(InUseError, match="another run is writing to it"):
        run.reproduce(OPTIONS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_job_that_another_process_still_writes_is_tried_again(tmp_path):
    """Exit code 75: the process of an earlier scheduler, which was killed, is still saving."""
    refused = [[sys.executable, "-c", "raise SystemExit(75)"]]

    def first_refused(out, job, share):
        return refused.pop() if refused else command(tmp_path / "log")(out, job, share)

    assert scheduler.run_all(OPTIONS, tmp_path, [Job("p", "e", "one")], command=first_refused) == []


def test_every_job_has_its_own_folder(tmp_path):
    job = Job("p", "e", "one", seed=2, variant="of-16")
    scheduler.run_all(OPTIONS, tmp_path, [job], command=command(tmp_path / "log"))
    assert json.loads((tmp_path / "runs" / "p" / "e" / "one" / "of-16-seed2" / RESULT_FILE).read_text())
