"""Requests and bytes of a save and of a restore in a bucket, counted by a proxy. docs/reliability.md has them."""

import time

import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.locations import open_location

SIZE = 2**21  # numbers in each of two arrays: 16.8 MB in all


def counted(proxy):
    """Returns the requests by kind, and bytes sent and received since the last call."""
    result = dict(proxy.requests), sum(proxy.sent.values()), sum(proxy.received.values())
    for counter in (proxy.requests, proxy.sent, proxy.received):
        counter.clear()
    return result


@pytest.mark.parametrize("store", ["gcs", "s3"])
def test_a_save_reads_nothing_back_and_a_restore_reads_once(store, request):
    proxy = request.getfixturevalue(f"{store}_proxy")
    workdir = open_location(proxy.bucket) / "run"
    rng = np.random.default_rng(0)
    params, opt_state = ({"a": jax.numpy.asarray(rng.standard_normal(SIZE, np.float32))} for _ in range(2))
    size = 2 * 4 * SIZE
    with Checkpointer(workdir, ExperimentConfig(checkpoint=CheckpointConfig(keep=1))) as checkpointer:
        for step in (1, 2):
            counted(proxy)
            start = time.monotonic()
            checkpointer.save(Progress(step, 0, step), params, opt_state)
            stall, before = time.monotonic() - start, sum(proxy.requests.values())
            checkpointer.wait()
            seconds = time.monotonic() - start
            requests, sent, received = counted(proxy)
    print(f"\n{store}: a save of {size:,} bytes: {requests}; {sent:,} bytes sent, {received:,} received")
    print(f"{store}: training waits {stall:.2f} of {seconds:.2f} s, for {before} requests")
    assert 0.85 * size < sent < 1.05 * size + 50_000 and received < 0.02 * size + 100_000
    with Checkpointer(workdir, ExperimentConfig()) as checkpointer:
        progress = checkpointer.latest()
        requests, _, received = counted(proxy)
        print(f"{store}: comparing the step with its digests: {requests}; {received:,} bytes received")
        assert received < 100_000
        restored = checkpointer.restore(progress, params, opt_state)
        requests, _, received = counted(proxy)
        print(f"{store}: restoring it: {requests}; {received:,} bytes received")
        assert 0.85 * size < received < 1.05 * size
    jax.tree.map(np.testing.assert_array_equal, restored, (params, opt_state))
