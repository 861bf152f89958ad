"""The lease file, with hosts that are only names and a clock that only the test moves."""

import contextlib
import dataclasses
import errno
import os
import threading

import pytest

from alignvlm_jax.leases import lease_file, renewed
from alignvlm_jax.leases.holder import Holder, Job, job_of
from alignvlm_jax.leases.lease import InUseError, LeaseLostError, Place
from alignvlm_jax.leases.lease_file import EXPIRE_SECONDS, LeaseFile, SeenLease


class Clock:
    """A clock that moves while somebody sleeps. `during_sleep` is what happens elsewhere meanwhile."""

    def __init__(self, during_sleep=lambda now: None):
        self.now, self._during_sleep = 1000.0, during_sleep

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self._during_sleep(self.now)


@pytest.fixture
def place(tmp_path):
    return Place.inside(tmp_path)


def holder(host, job=None, attempt=0):
    return Holder(host, 7, "2026-01-01 00:00:00 UTC", machine=host, birth="1", job=job and Job(job, attempt))


def take(place, host, clock=None, **job):
    clock = clock or Clock()
    return LeaseFile(place, holder(host, **job), clock=clock, sleep=clock.sleep, renews_itself=False)


def make_old(place):
    """Makes the lease look as if it had not been renewed for a while, as it does on a file server."""
    for path in place.folder.glob(".writer.lease.*"):
        os.utime(path, (1, 1))


def test_a_live_holder_refuses_at_once(place):
    lease, clock = take(place, "a"), Clock()
    with pytest.raises(InUseError, match="host a, pid 7, since 2026-01-01 00:00:00 UTC"):
        take(place, "b", clock)
    assert clock.now == 1000
    lease.check()


def test_a_holder_whose_clock_is_wrong_refuses_after_its_next_renewal(place):
    """No time of one host is compared with another's: the content of the lease changes, or it does not."""
    lease = take(place, "a")
    make_old(place)
    clock = Clock(lambda now: now == 1015 and lease.renew())
    with pytest.raises(InUseError, match="host a"):
        take(place, "b", clock)
    assert clock.now == 1015
    lease.check()


def test_a_dead_holder_refuses_for_at_most_60_seconds(place, capsys):
    """huggingface/huggingface_hub#3944: a lock file of a killed pod on shared storage blocks all others."""
    dead = take(place, "a")
    make_old(place)
    clock = Clock()
    lease = take(place, "b", clock)
    assert clock.now == 1000 + EXPIRE_SECONDS == 1060
    assert "waiting up to 60 s to see whether another run (host a, pid 7" in capsys.readouterr().err
    with pytest.raises(LeaseLostError, match="another run took over its lease: host b, pid 7"):
        dead.check()
    lease.check()
    # The end of the dead one, if it was only asleep, does not free the place.
    dead.release()
    with pytest.raises(InUseError, match="host b"):
        take(place, "c")
    lease.release()
    assert not list(place.folder.iterdir())


def test_a_place_that_is_released_while_somebody_waits_is_free(place):
    lease = take(place, "a")
    make_old(place)
    clock = Clock(lambda now: lease.release())
    take(place, "b", clock).check()
    assert clock.now == 1001


def take_together(place, hosts, clock):
    """Takes the lease for several hosts at the same moment; returns the leases of those that get it."""
    leases = []

    def run(host):
        with contextlib.suppress(InUseError):
            leases.append(take(place, host, clock()))

    threads = [threading.Thread(target=run, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return leases


def fail_to_link(source, target):
    raise OSError(errno.EPERM, "no links")


@pytest.mark.parametrize("has_links", [True, False])
def test_of_those_that_wait_for_a_dead_holder_one_wins(place, monkeypatch, has_links):
    """NFS and FUSE. All find the lease expired at the same moment, many times over."""
    if not has_links:
        monkeypatch.setattr(lease_file.os, "link", fail_to_link)
    # Fewer looks at the lease while waiting; nothing happens between them.
    monkeypatch.setattr(lease_file, "_POLL_SECONDS", 10)
    barrier = threading.Barrier(4)
    for _ in range(12):
        take(place, "a")
        make_old(place)
        (winner,) = take_together(place, "bcde", lambda: Clock(lambda now: now == 1060 and barrier.wait()))
        winner.check()
        winner.release()


def test_of_those_that_start_at_once_one_wins(place):
    barrier = threading.Barrier(8)
    for _ in range(5):
        (winner,) = take_together(place, "abcdefgh", lambda: barrier.wait() < 8 and Clock())
        winner.check()
        winner.release()


def test_a_link_whose_answer_nfs_has_lost_counts(place, monkeypatch):
    """A repeated request finds the link that the first one has made."""
    link = os.link

    def linked_twice(source, target):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(lease_file.os, "link", linked_twice)
    take(place, "a").check()


def test_a_waiter_that_is_too_late_takes_nothing(place, monkeypatch):
    """It is about to take over from `a`. Meanwhile another has done so and has ended, and `c` has started."""
    take(place, "a")
    make_old(place)
    create, others = lease_file._create, []

    def late(place, number, holder, mark):
        if holder.host == "b" and not others:
            (place.folder / ".writer.lease.1").unlink()
            others.append(take(place, "c"))
        return create(place, number, holder, mark)

    monkeypatch.setattr(lease_file, "_create", late)
    with pytest.raises(InUseError, match="host c"):
        take(place, "b")
    others[0].check()


@pytest.mark.parametrize("before, now", [(0, 1), (0, 0)])
def test_the_same_job_takes_over_at_once(place, before, now):
    """A requeued Slurm job, a restarted JobSet (with a count of its restarts), a queued resource (without)."""
    old, clock = take(place, "a", job="Slurm 42", attempt=before), Clock()
    lease = take(place, "b", clock, job="Slurm 42", attempt=now)
    assert clock.now == 1000
    lease.check()
    with pytest.raises(LeaseLostError, match="job Slurm 42"):
        old.check()


@pytest.mark.parametrize("job, attempt", [("Slurm 43", 5), ("Slurm 42", 0)])
def test_another_job_and_an_earlier_start_do_not_take_over(place, job, attempt):
    """Lightning-AI/pytorch-lightning#12369: two requeued jobs in one folder resume from the same checkpoint."""
    lease = take(place, "a", job="Slurm 42", attempt=1)
    with pytest.raises(InUseError, match="job Slurm 42"):
        take(place, "b", job=job, attempt=attempt)
    lease.check()


@pytest.mark.parametrize(
    "environ, job",
    [
        ({"SLURM_JOB_ID": "42"}, Job("Slurm 42")),
        ({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "big"}, Job("Slurm big 42", 2)),
        ({"ALIGNVLM_JOB": "JobSet default/alignvlm", "ALIGNVLM_JOB_ATTEMPT": "3"}, Job("JobSet default/alignvlm", 3)),
        ({"SLURM_JOB_ID": "", "ALIGNVLM_JOB": ""}, None),
    ],
)
def test_the_job_is_read_from_the_environment(environ, job):
    assert job_of(environ) == job


def test_two_processes_of_one_job_on_one_machine_are_two_runs(place):
    """Two terminals in one allocation. The system knows that the first process runs."""
    mine = dataclasses.replace(Holder.this_process({}), job=Job("Slurm 42"))
    lease = LeaseFile(place, mine, renews_itself=False)
    with pytest.raises(InUseError, match=f"pid {os.getpid()}"):
        LeaseFile(place, mine, renews_itself=False)
    # Its process id belongs to another process now.
    lease.release()
    LeaseFile(place, dataclasses.replace(mine, birth="1"), renews_itself=False)
    LeaseFile(place, mine, renews_itself=False).check()


def test_a_holder_that_cannot_renew_gives_up_before_others_may_take_over(place, monkeypatch):
    clock = Clock()
    lease = take(place, "a", clock)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lease_file.os, "open", fail)
    clock.now += 44
    lease.check()
    clock.now += 2
    with pytest.raises(LeaseLostError, match="could not be renewed for 45 s"):
        lease.check()
    assert clock.now < 1000 + EXPIRE_SECONDS


def test_a_thread_renews_the_lease_until_it_is_released(place, monkeypatch):
    monkeypatch.setattr(renewed, "RENEW_SECONDS", 0.01)
    lease = LeaseFile(place)
    path = place.folder / ".writer.lease.1"
    first = path.read_bytes()
    pause = threading.Event()
    while path.read_bytes() == first:
        pause.wait(0.005)
    # The thread also finds out that the lease is lost.
    path.unlink()
    with pytest.raises(LeaseLostError):
        while True:
            lease.raise_if_lost()
            pause.wait(0.005)


def test_the_other_processes_of_a_run_check_the_lease_of_the_first(place):
    lease = take(place, "a", job="j")
    seen = SeenLease(place, lease.ticket())
    seen.check()
    take(place, "b", job="j")
    with pytest.raises(LeaseLostError, match="host b"):
        seen.check()
