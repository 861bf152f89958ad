"""How processes find each other, as far as one process can tell; several of them are in test_processes.py."""

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed


def test_alone_a_process_is_primary_and_gathers_itself():
    distributed.initialize()
    assert distributed.is_primary()
    assert distributed.gather_json({"row": [1, 2]}) == [{"row": [1, 2]}]


@pytest.mark.parametrize(
    "environ, several",
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
def test_clusters_are_recognised(environ, several):
    assert distributed.several_hosts(environ) == several


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(coordinator="a:1"), "--coordinator without --num-processes and --process-id"),
        (dict(coordinator="a", num_processes=2, process_id=0), "expected HOST:PORT, got 'a'"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--process-id: expected 0 to 1, got 2"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(**arguments)
