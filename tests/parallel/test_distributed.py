"""Start-up of a run, tested in a single process; test_processes.py starts several processes."""

import subprocess
import sys

import jax
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed, launchers


def test_a_single_process_is_primary_and_gathers_its_own_value():
    distributed.initialize()
    assert distributed.is_primary()
    assert distributed.gather_json({"row": [1, 2]}) == [{"row": [1, 2]}]


SLURM_TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "16"}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
}


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({"JAX_PLATFORMS": "cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_PLATFORMS": "cpu", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        (SLURM_TASK, True),
        ({**SLURM_TASK, "SLURM_STEP_NUM_TASKS": "1"}, False),
        # A notebook or a shell in an allocation (jax-ml/jax#30073): no number of a task or of a step, or the numbers of
        # slurm.h that stand for an interactive step, a batch script and an external one.
        ({**SLURM_TASK, "SLURM_PROCID": ""}, False),
        ({**SLURM_TASK, "SLURM_STEP_ID": ""}, False),
        ({**SLURM_TASK, "SLURM_STEP_ID": str(0xFFFFFFFA)}, False),
        ({**SLURM_TASK, "SLURM_STEP_ID": str(0xFFFFFFFB)}, False),
        ({**SLURM_TASK, "SLURM_STEP_ID": str(0xFFFFFFFC)}, False),
        ({name: "" for name in SLURM_TASK}, False),
        (OPEN_MPI_4, True),
        ({**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "", "JOB_COMPLETION_INDEX": ""}, False),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_multi_host_environments_are_recognized(environ, expected):
    assert launchers.is_multi_host(environ) == expected


@pytest.mark.parametrize(
    "environ, rank",
    [
        # Open MPI 5 does not set the address that JAX reads (jax-ml/jax#14576).
        ({**OPEN_MPI_4, "OMPI_MCA_orte_hnp_uri": ""}, "rank 1 of 2 (OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE)"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "rank 0 of 4 (PMI_RANK, PMI_SIZE)"),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "3"}, "rank 3 of 4"),
        # torchrun within a Slurm step of one task per node: JAX would join the wrong processes.
        ({"WORLD_SIZE": "8", "RANK": "5", "MASTER_ADDR": "node-1"}, "--coordinator node-1:PORT"),
        ({**SLURM_TASK, "WORLD_SIZE": "128", "RANK": "5"}, "--num-processes 128 --process-id 5"),
        (OPEN_MPI_4, None),
        ({**SLURM_TASK, "PMI_SIZE": "16", "PMI_RANK": "3"}, None),  # srun --mpi=pmi2
        ({"WORLD_SIZE": "8"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "", "RANK": "", "PMI_SIZE": "x"}, None),
    ],
)
def test_ranks_that_would_train_alone_in_one_folder_are_refused(environ, rank):
    """Physical-Intelligence/openpi#868: every rank prepares, and deletes, the same folder."""
    problem = launchers.unjoined_rank(environ)
    assert problem is None if rank is None else rank in problem


def test_a_refused_rank_names_the_flag_and_one_process_needs_no_other_flag(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="--num-processes 2 --process-id 1"):
        distributed.initialize()
    distributed.initialize(num_processes=1)
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    "environ, method",
    [
        (SLURM_TASK, None),
        ({"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, None),
        ({"SLURM_PROCID": "", "TPU_WORKER_HOSTNAMES": "a-0,a-1"}, "gketpu"),
        ({"SLURM_PROCID": "", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
        ({"SLURM_PROCID": ""}, "gcetpu"),
        ({**OPEN_MPI_4, "SLURM_PROCID": "0"}, None),
    ],
)
def test_left_over_variables_of_slurm_do_not_mislead_jax(environ, method):
    """jax-ml/jax#30073."""
    assert launchers.detection_method(environ) == method


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
