"""Checkpoints in a bucket whose store fails: retries, damaged objects, truncated uploads."""

import functools

import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints import integrity
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress, complete_steps
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.objects import list_objects
from tests import fault_proxy
from tests.fault_proxy import CUT, HALF

pytestmark = pytest.mark.large


def state_at(step):
    """Returns weights and optimizer state of random numbers, which TensorStore keeps in objects of their own."""
    rng = np.random.default_rng(step)
    weights, moments = (jax.numpy.asarray(rng.standard_normal(4096, np.float32)) for _ in range(2))
    return {"language": {"embedding": weights}}, {"mu": {"embedding": moments}}


def save(workdir, *steps):
    with Checkpointer(workdir, ExperimentConfig()) as checkpointer:
        for step in steps:
            checkpointer.save(Progress(step, 0, step), *state_at(step), {"rows": step})


def restored_step(workdir):
    """Returns the step that a run would resume from, after comparing every number of it."""
    with Checkpointer(workdir, ExperimentConfig()) as checkpointer:
        progress = checkpointer.latest()
        restored = checkpointer.restore(progress, *state_at(progress.step))
        jax.tree.map(np.testing.assert_array_equal, restored, state_at(progress.step))
        return progress.step


@pytest.fixture(params=["gcs", "s3"])
def proxy(request):
    return request.getfixturevalue(f"{request.param}_proxy")


@pytest.fixture
def workdir(proxy):
    return open_location(proxy.bucket) / "run"


def test_every_damaged_object_is_named(workdir):
    save(workdir, 10)
    step = workdir / "checkpoints" / "10"
    names = sorted(list_objects(step))
    assert len(names) > 10
    for name in names:
        content = (step / name).read_bytes()
        for damage in "overwritten", "truncated", "deleted":
            if damage == "deleted":
                (step / name).unlink()
            else:
                changed = bytes([content[0] ^ 1]) + content[1:]
                (step / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else changed)
            reason = integrity.damage(step)
            # A list of digests that is missing means that the step was never complete.
            assert reason and (name in reason or "digests" in name), (name, damage, reason)
        (step / name).write_bytes(content)
        assert integrity.damage(step) is None
    assert restored_step(workdir) == 10


def test_errors_that_pass_are_retried(proxy, workdir):
    errors, slow = fault_proxy.errors(0.2), fault_proxy.slow(0.01)
    proxy.fault = lambda request: errors(request) or slow(request)
    save(workdir, 10, 20, 30)
    assert restored_step(workdir) == 30
    print(f"failed {dict(proxy.failed)} of {dict(proxy.requests)}")
    assert sum(proxy.failed.values()) > 10


@pytest.mark.parametrize("fault", [CUT, HALF], ids=["cut", "half"])
def test_a_truncated_upload_never_counts_as_a_complete_step(proxy, workdir, fault, monkeypatch):
    """Each upload of step 20 in turn is cut off, or only half of it arrives."""
    monkeypatch.setattr(integrity, "wait_for_seals", functools.partial(integrity.wait_for_seals, seconds=2))
    save(workdir, 10)
    for index in range(100):
        seen = []

        def truncate(request, seen=seen, index=index):
            if request.kind == "upload" and "/checkpoints/20/" in request.name:
                seen.append(request.name)
                return fault if len(seen) == index + 1 else None

        proxy.fault = truncate
        try:
            save(workdir, 20)
        except (UserError, ValueError) as error:
            outcome = str(error)
        else:
            outcome = "saved"
        proxy.fault = fault_proxy.no_fault
        if index >= len(seen):
            assert index > 5
            break
        step = restored_step(workdir)
        print(f"{seen[index].partition('/20/')[2]}: {outcome}, restored {step}")
        assert step == (20 if outcome == "saved" else 10) == complete_steps(workdir / "checkpoints")[-1]
        integrity.remove(workdir / "checkpoints" / "20")
