"""Runs in a bucket that are killed (kill -9), also in the middle of chosen requests, until they finish."""

import random
import threading
import time
from collections.abc import Callable

import pytest

from tests.fault_proxy import CUT, Fault, Request
from tests.parallel import processes
from tests.training.test_kill import Run, assert_undisturbed, kill_runs, wait_for_step, wait_until


class KillInRequest:
    """A fault that kills processes when a request has arrived, before the store has it.

    Args:
      started: the processes.
      matches: tells which requests count.
      skip: number of matching requests to let pass.
    """

    def __init__(self, started: list[processes.Process], matches: Callable[[Request], bool], skip: int = 0):
        self._started, self._matches, self._skip = started, matches, skip
        self._lock = threading.Lock()
        self.request: Request | None = None

    def __call__(self, request: Request) -> Fault | None:
        with self._lock:
            if self.request:
                return CUT  # what a killed process sent before never arrives
            if not self._matches(request):
                return None
            if self._skip:
                self._skip -= 1
                return None
            self.request = request
        for process in self._started:
            process.process.kill()
        return CUT


def is_part(request: Request) -> bool:
    """Returns whether a request uploads a part of a step."""
    return request.kind == "upload" and "/checkpoints/" in request.name and not is_seal(request)


def is_seal(request: Request) -> bool:
    return request.kind == "upload" and "/digests." in request.name


def is_deletion(request: Request) -> bool:
    return request.kind == "delete" and "/checkpoints/" in request.name


def runs(tmp_path, proxy, steps: int, num_processes: int = 1) -> tuple[Run, Run]:
    """Returns the run that is killed, in the bucket, and one on a disk that is not."""
    undisturbed = Run(tmp_path / "undisturbed", str(tmp_path / "undisturbed" / "run"), steps, num_processes)
    return Run(tmp_path / "killed", f"{proxy.bucket}/runs/killed", steps, num_processes), undisturbed


def kill_in_bucket(tmp_path, proxy, kills: int, num_processes: int = 1) -> None:
    """Kills a run in the bucket of the proxy, and asserts that it ends as one that was not killed."""
    steps = max(12, 2 * kills)
    run, undisturbed = runs(tmp_path, proxy, steps, num_processes)
    undisturbed.finish()
    pace, rng, places = undisturbed.pace(), random.Random(1), []

    def kill(number, started, step):
        wait_for_step(run, started[0], step)
        place = ("any moment", "an upload", "before the seal", "a deletion")[number % 4]
        if place == "any moment":
            time.sleep(rng.uniform(0, 2 * pace))
        else:
            matches = {"an upload": is_part, "before the seal": is_seal, "a deletion": is_deletion}[place]
            proxy.fault = fault = KillInRequest(started, matches, rng.randint(0, 5) if matches is is_part else 0)
            wait_until(started[0], lambda: fault.request is not None)
            place = f"{place} ({fault.request.name.rpartition('/checkpoints/')[2]})" if fault.request else "the end"
        for process in started:
            process.process.kill()
            process.process.wait()
        proxy.fault = lambda request: None
        places.append(place)

    outcomes = kill_runs(run, kills, kill)
    print(f"{kills} kills of a run of {steps} steps: {[{'at': a, **b} for a, b in zip(places, outcomes, strict=True)]}")
    print(f"requests: {dict(proxy.requests)}, bytes sent: {dict(proxy.sent)}, received: {dict(proxy.received)}")
    assert sum(outcome["in a save"] for outcome in outcomes) >= kills // 4, "too few kills fell into a save"
    assert len({outcome["to"] for outcome in outcomes}) >= kills // 2, "the kills are not spread over the run"
    assert_undisturbed(run, undisturbed)


@pytest.mark.large
def test_a_run_on_gcs_killed_in_the_middle_of_requests_ends_with_the_same_weights(tmp_path, gcs_proxy):
    kill_in_bucket(tmp_path, gcs_proxy, kills=20)


@pytest.mark.large
def test_a_run_on_s3_killed_in_the_middle_of_requests_ends_with_the_same_weights(tmp_path, s3_proxy):
    kill_in_bucket(tmp_path, s3_proxy, kills=4)


@pytest.mark.large
def test_two_processes_on_gcs_killed_in_the_middle_of_requests_end_with_the_same_weights(tmp_path, gcs_proxy):
    kill_in_bucket(tmp_path, gcs_proxy, kills=4, num_processes=2)


@pytest.mark.large
def test_two_processes_on_s3_that_are_killed_share_the_disk_that_steps_are_staged_on(tmp_path, s3_proxy, monkeypatch):
    monkeypatch.setenv("ALIGNVLM_STAGING", str(tmp_path / "staging"))
    kill_in_bucket(tmp_path, s3_proxy, kills=2, num_processes=2)
