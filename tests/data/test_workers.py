"""Tasks in processes: each is done once, and errors and killed processes are reported."""

import functools
import os
import signal
import struct
import sys

import pytest

from alignvlm_jax.data import workers
from alignvlm_jax.data.workers import WorkerDied, run_tasks


def test_every_task_is_done_once():
    for processes in (1, 3):
        results = dict(run_tasks(functools.partial(pow, 2), range(30), processes))
        assert results == {i: 2**i for i in range(30)}
    assert list(run_tasks(abs, [], 4)) == []


def test_an_error_in_a_task_is_raised_here():
    for processes in (1, 2):
        with pytest.raises(ValueError, match="invalid literal"):
            list(run_tasks(int, ["1", "x", "3"], processes))


def test_killed_process_ends_the_run_and_names_its_tasks():
    with pytest.raises(WorkerDied) as error:
        list(run_tasks(signal.raise_signal, [signal.SIGKILL] * 9, 2))
    assert 1 <= len(error.value.tasks) <= 4


def die_while_sending(_):
    """Sends the length of a result, and dies."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        frame = frame.f_back
    os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1000))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_while_it_sends_a_result_ends_the_run(monkeypatch):
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(workers, "_GRACE_SECONDS", 0.1)
    with pytest.raises(WorkerDied):
        list(run_tasks(die_while_sending, range(9), 2))


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory"), PermissionError(13, "denied")])
def test_without_dev_shm_one_process_does_the_work(error, monkeypatch, capsys):
    """cloudflare/containers#252, travis-ci/travis-cookbooks#241: semaphores cannot be made in some containers."""

    def fail(*args):
        raise error

    monkeypatch.setattr("_multiprocessing.SemLock", fail)
    assert dict(run_tasks(abs, [-1, 2], 2)) == {-1: 1, 2: 2}
    assert str(error) in capsys.readouterr().err
