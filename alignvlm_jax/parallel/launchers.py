"""Reads from environment variables whether a launcher has started this process as one of several.

Launchers that `jax.distributed` knows are joined (`distributed.initialize`). A process that another launcher started as
one of several ranks is refused. Otherwise, every rank would run the complete command alone, in the same folder.

An empty variable counts as absent: schedulers and notebooks often set some of their variables to nothing.
"""

import dataclasses
from collections.abc import Mapping

_LARGEST_STEP = 0xFFFF_FFF0
"""Largest number of a step of Slurm. The numbers above stand for batch scripts, shells of `salloc`, and the like."""

_OPEN_MPI = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
_OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"
"""Set by Open MPI up to version 4. JAX needs it to find the other ranks."""

_RANKS = (
    _OPEN_MPI,
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI, Cray
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # MVAPICH
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),  # jsrun
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("WORLD_SIZE", "RANK"),  # torchrun, accelerate, DeepSpeed
)
"""Variables with the number of ranks and the rank of this process, by launcher."""


@dataclasses.dataclass(frozen=True)
class _Rank:
    """Rank of a process, as set by the launchers of MPI or by torchrun.

    Attributes:
      index: index of the process.
      size: number of processes.
      variables: the variables that say so.
    """

    index: int
    size: int
    variables: tuple[str, str]


def is_multi_host(environ: Mapping[str, str]) -> bool:
    """Returns whether JAX can find other processes of the run by the environment variables."""
    return (
        bool(environ.get("JAX_COORDINATOR_ADDRESS"))
        or bool(environ.get(_OPEN_MPI_ADDRESS))
        and (_number(environ, _OPEN_MPI[0]) or 1) > 1
        or _is_slurm_task(environ)
        or _is_indexed_pod(environ)
        or len(_tpu_workers(environ)) > 1
        or (_number(environ, "MEGASCALE_NUM_SLICES") or 1) > 1
    )


def detection_method(environ: Mapping[str, str]) -> str | None:
    """Returns the kind of cluster that `jax.distributed.initialize` should join, or None to let it search.

    JAX takes any process with Slurm's variables for a task of Slurm, even if it is none or if they are empty.
    """
    if "SLURM_PROCID" not in environ or _is_slurm_task(environ) or environ.get(_OPEN_MPI_ADDRESS):
        return None
    if _tpu_workers(environ):
        return "gketpu"
    return "k8s" if _is_indexed_pod(environ) else "gcetpu"


def unjoined_rank(environ: Mapping[str, str]) -> str | None:
    """Returns why this process must not run alone, and what to do, if it is a rank that JAX cannot join; else None."""
    rank = _rank(environ)
    if rank is None or is_multi_host(environ):
        return None
    host = environ.get("MASTER_ADDR") or "HOST"
    return (
        f"this is rank {rank.index} of {rank.size} ({', '.join(rank.variables)}), but JAX cannot find the other ranks, "
        f"so each would run alone in the same folder: pass --coordinator {host}:PORT (a free port on the host of rank "
        f"0) --num-processes {rank.size} --process-id {rank.index}, the last with the number of each rank. Or pass "
        "--num-processes 1 if each rank is a run of its own"
    )


def _rank(environ: Mapping[str, str]) -> _Rank | None:
    """Returns the rank of this process, or None if no launcher has started it as one of several."""
    for size_name, rank_name in _RANKS:
        size, index = _number(environ, size_name), _number(environ, rank_name)
        if index is not None and (size or 1) > 1:
            return _Rank(index, size, (rank_name, size_name))
    return None


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Returns whether this process is one of several tasks of a Slurm step.

    A shell or a notebook inside an allocation is no task: it lacks the number of a task, or that of a real step.
    """
    step = _number(environ, "SLURM_STEP_ID")
    if _number(environ, "SLURM_PROCID") is None or step is None or step > _LARGEST_STEP:
        return False
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS") or 1
    # `mpirun` and `torchrun` may start their ranks within the tasks of a step, and more of them.
    rank = _rank(environ)
    return tasks > 1 and (rank is None or rank.size == tasks)


def _is_indexed_pod(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("KUBERNETES_SERVICE_HOST") and environ.get("JOB_COMPLETION_INDEX"))


def _tpu_workers(environ: Mapping[str, str]) -> list[str]:
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    return names.split(",") if names else []


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """Returns the value of a variable, or None if it is absent, empty or not a number."""
    text = environ.get(name) or ""
    return int(text) if text.isdecimal() else None
