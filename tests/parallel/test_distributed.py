"""Start-up of a run, tested in a single process; test_processes.py starts several processes."""

import subprocess
import sys

import jax
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed


def test_a_single_process_is_primary_and_gathers_its_own_value():
    distributed.initialize()
    assert distributed.is_primary()
    assert distributed.gather_json({"row": [1, 2]}) == [{"row": [1, 2]}]


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({"JAX_PLATFORMS": "cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_PLATFORMS": "cpu", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "16"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_multi_host_environments_are_recognized(environ, expected):
    assert distributed.is_multi_host(environ) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(coordinator="a:1"), "--coordinator without --num-processes and --process-id"),
        (dict(coordinator="a", num_processes=2, process_id=0), "expected HOST:PORT, got 'a'"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--process-id: expected 0 to 1, got 2"),
    ],
)
def test_incomplete_or_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(**arguments)


def test_a_process_gives_up_when_the_others_do_not_start():
    """Runs in a process of its own, because giving up ends the process."""
    join = "from alignvlm_jax.parallel import distributed as d; d._START_SECONDS = 1; d.initialize('localhost:1', 2, 1)"
    done = subprocess.run([sys.executable, "-c", join], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: process 1 has waited 1 s for the other processes of the run, at localhost:1" in done.stderr


def test_a_cluster_that_jax_cannot_read_is_an_error(monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(UserError, match="cannot be found: coordinator_address .*--coordinator"):
        distributed.initialize()
