"""Runs in a bucket whose store fails: errors that pass, missing permission."""

import dataclasses

import pytest

from alignvlm_jax.checkpoints.workdir import complete_steps, numbered_steps
from alignvlm_jax.commands.program import run_program
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.locations import open_location
from tests import fault_proxy
from tests.fault_proxy import Fault
from tests.parallel import tiny

STEPS = 6


def experiment(steps=STEPS):
    config = tiny.config((8, 1, 1))
    (stage,) = config.stages
    checkpoint = CheckpointConfig(every_steps=1, keep=2)
    return dataclasses.replace(config, stages=(dataclasses.replace(stage, steps=steps),), checkpoint=checkpoint)


def train(workdir, losses, on_step=None, steps=STEPS):
    """Trains as `alignvlm train` does; returns the exit code. `losses` is filled with those of this session."""

    def body():
        tiny.train(workdir, experiment(steps), losses=losses, examples=[], on_step=on_step)

    return run_program("alignvlm", body)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of a run on a disk."""
    losses = {}
    assert train(tmp_path_factory.mktemp("undisturbed"), losses) == 0
    return losses


def steps_of(workdir):
    checkpoints = open_location(workdir) / "checkpoints"
    return complete_steps(checkpoints), numbered_steps(checkpoints)


@pytest.mark.large
def test_errors_that_pass_are_retried(gcs_proxy, undisturbed):
    errors, slow = fault_proxy.errors(0.1), fault_proxy.slow(0.02)
    gcs_proxy.fault = lambda request: errors(request) or slow(request)
    losses = {}
    assert train(f"{gcs_proxy.bucket}/run", losses) == 0
    assert losses == undisturbed and sum(gcs_proxy.failed.values()) > 10
    gcs_proxy.fault = fault_proxy.no_fault
    assert steps_of(f"{gcs_proxy.bucket}/run") == ([STEPS - 1, STEPS],) * 2
    print(f"failed {dict(gcs_proxy.failed)} of {dict(gcs_proxy.requests)}")


@pytest.mark.large
def test_without_permission_a_run_ends_before_it_trains(gcs_proxy, capsys):
    gcs_proxy.fault = lambda request: Fault(status=403) if request.kind in ("upload", "start") else None
    losses = {}
    assert train(f"{gcs_proxy.bucket}/run", losses) == 2
    assert not losses and "Grant this account the right" in capsys.readouterr().err
