"""The lease in a bucket, with hosts that are only names and a clock that only the test moves."""

import contextlib
import threading
import time

import pytest

from alignvlm_jax.errors import TemporaryError
from alignvlm_jax.leases import lease_object
from alignvlm_jax.leases.lease import InUseError, LeaseLostError, Place
from alignvlm_jax.leases.lease_object import LeaseObject, SeenLeaseObject
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.leases.renewed import EXPIRE_SECONDS
from alignvlm_jax.storage.objects import list_objects
from alignvlm_jax.storage.versioned import versioned_object
from tests.leases.test_lease_file import Clock, holder


@pytest.fixture
def place(gcs_bucket):
    return Place.inside(f"{gcs_bucket}/run")


@pytest.fixture(params=["gcs", "s3"])
def any_place(request):
    """A place on GCS and one on S3, for the tests of what the two do differently."""
    return Place.inside(request.getfixturevalue(f"{request.param}_bucket") + "/run")


def take(place, host, clock=None, *, is_old=False, **job):
    """Takes the lease. With `is_old`, another one looks as if it had not been renewed for a while."""
    clock = clock or Clock()
    now = time.time() + 3600 * is_old
    return LeaseObject(
        place, holder(host, **job), clock=clock, sleep=clock.sleep, time_of_day=lambda: now, renews_itself=False
    )


def test_a_live_holder_refuses(place):
    """At once; or, if the clock is wrong, after its next renewal."""
    lease, clock = take(place, "a"), Clock()
    with pytest.raises(InUseError, match="host a, pid 7, since 2026-01-01 00:00:00 UTC"):
        take(place, "b", clock)
    assert clock.now == 1000
    clock = Clock(lambda now: now == 1015 and lease.renew())
    with pytest.raises(InUseError, match="host a"):
        take(place, "b", clock, is_old=True)
    assert clock.now == 1015
    lease.check()


def test_a_dead_holder_refuses_for_at_most_60_seconds(any_place, capsys):
    """huggingface/huggingface_hub#3944: a lock file of a killed pod on shared storage blocks all others."""
    dead, clock = take(any_place, "a"), Clock()
    lease = take(any_place, "b", clock, is_old=True)
    assert clock.now == 1000 + EXPIRE_SECONDS == 1060
    assert "waiting up to 60 s to see whether another run (host a, pid 7" in capsys.readouterr().err
    with pytest.raises(LeaseLostError, match="another run took over its lease: host b, pid 7"):
        dead.check()
    lease.check()
    # The end of the dead one, if it was only asleep, does not free the place.
    dead.release()
    with pytest.raises(InUseError, match="host b"):
        take(any_place, "c")
    # A place that is released while somebody waits is free.
    clock = Clock(lambda now: lease.release())
    take(any_place, "c", clock, is_old=True).release()
    assert clock.now == 1005 and not list_objects(any_place.folder)


@pytest.mark.parametrize("before, now", [(0, 1), (0, 0)])
def test_the_same_job_takes_over_at_once(place, before, now):
    """A requeued Slurm job, a restarted JobSet (with a count of its restarts), a queued resource (without)."""
    old, clock = take(place, "a", job="Slurm 42", attempt=before), Clock()
    seen = SeenLeaseObject(place, old.ticket())
    seen.check()
    take(place, "b", clock, job="Slurm 42", attempt=now).check()
    assert clock.now == 1000
    for lease in (old, seen):
        with pytest.raises(LeaseLostError, match="job Slurm 42"):
            lease.check()


def test_of_those_that_take_over_at_once_one_wins(any_place, monkeypatch):
    """All have read the same version of a dead holder's lease."""
    take(any_place, "a", job="j")
    barrier, winners = threading.Barrier(4), []
    read = type(versioned_object(any_place.file("lease"))).read

    def read_together(stored):
        found = read(stored)
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(5)
        barrier.abort()  # only the first reads are at the same moment
        return found

    monkeypatch.setattr(type(versioned_object(any_place.file("lease"))), "read", read_together)
    if any_place.output.startswith("s3://"):
        # moto compares and writes in two steps, other than S3.
        write, mutex = lease_object.LeaseObject._write, threading.Lock()

        def write_alone(*arguments):
            with mutex:
                return write(*arguments)

        monkeypatch.setattr(lease_object.LeaseObject, "_write", write_alone)

    def run(host):
        with contextlib.suppress(InUseError):
            winners.append(take(any_place, host, job="j", attempt=1))

    threads = [threading.Thread(target=run, args=(host,)) for host in "bcde"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = winners
    winner.check()


def test_a_repeated_upload_that_meets_itself_counts(place, monkeypatch):
    """googleapis/python-storage: an upload whose answer was lost is repeated, and its precondition then fails."""
    stored = type(versioned_object(place.file("lease")))
    write = stored.write
    monkeypatch.setattr(stored, "write", lambda *arguments: write(*arguments) and None)
    lease = take(place, "a")
    lease.check()
    lease.check()
    versioned_object(place.file("lease")).delete(lease._version)
    with pytest.raises(LeaseLostError, match="its lease was deleted"):
        lease.check()


def test_a_holder_that_cannot_renew_gives_up_before_others_may_take_over(place, monkeypatch):
    clock = Clock()
    lease = take(place, "a", clock)

    def fail(*arguments):
        raise TemporaryError("503")

    monkeypatch.setattr(lease._object, "write", fail)
    clock.now += 44
    lease.check()
    clock.now += 2
    with pytest.raises(LeaseLostError, match="could not be renewed for 45 s"):
        lease.check()
    assert clock.now < 1000 + EXPIRE_SECONDS


def test_outputs_in_buckets_take_the_lease(place):
    with one_writer(place.output) as lease, pytest.raises(InUseError):
        assert isinstance(lease, lease_object.LeaseObject)
        with one_writer(place.output):
            pytest.fail("the block must not run")
    with one_writer(f"{place.output}/out.jsonl", beside=True):
        assert list(list_objects(place.folder)) == [".out.jsonl.writer.lease"]
    assert not list_objects(place.folder)
