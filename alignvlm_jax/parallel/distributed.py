"""Several processes as one run: how they find each other, and what they tell each other outside of the training step.

Every process runs the same program on its own devices (`jax.distributed`). Process 0 is the *primary*: it alone prints
and writes what is written once. Alone, a process is primary, and everything here costs nothing.
"""

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignvlm_jax.errors import UserError

_GOOGLE_PCI_VENDOR = "0x1ae0"


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, before anything else is asked of JAX. Alone, nothing happens.

    TPU pods (queued resources, GKE), indexed Kubernetes jobs and Slurm (one task per GPU) are recognised, and JAX reads
    there who takes part. Elsewhere the arguments say so, on every host:

    Args:
      coordinator: HOST:PORT of process 0, with a port that is free there.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      UserError: the arguments do not go together, or the others cannot be reached.
    """
    arguments = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    given = [name for name, value in arguments.items() if value is not None]
    if given and len(given) < len(arguments):
        missing = " and ".join(name for name in arguments if name not in given)
        raise UserError(f"{', '.join(given)} without {missing}: several processes need all three, one process none")
    if not given and not several_hosts(os.environ):
        return
    if given:
        if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
            raise UserError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id: expected 0 to {num_processes - 1}, got {process_id}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        # A TPU that belongs to no pod: JAX found nobody else.


def several_hosts(environ: Mapping[str, str]) -> bool:
    """Whether the environment looks like one of several hosts, or like a TPU, where only JAX can tell."""
    tpu_workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    return (
        "JAX_COORDINATOR_ADDRESS" in environ
        or ("SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1)
        or ("KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ)
        or len(tpu_workers.split(",")) > 1
        or int(environ.get("MEGASCALE_NUM_SLICES") or "1") > 1
        or (environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _has_tpu())
    )


def is_primary() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def gather_json(value: Any) -> list[Any]:
    """What every process says, in the order of the processes; all must call it at the same point.

    Args:
      value: anything JSON can hold.
    """
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    lengths = _gather(np.array([len(text)], np.int32))[:, 0]
    # Padded to a power of two, so that few lengths are compiled for.
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)
    padded[: len(text)] = text
    rows = _gather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _gather(local: np.ndarray) -> np.ndarray:
    """[n] of every process -> [processes, n]. Each device carries its process's copy, so their numbers may differ."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices), "devices", axis_types=(AxisType.Auto,))
    spread, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("devices"), PartitionSpec()))
    pieces = [jax.device_put(local[None], device) for device in jax.local_devices()]
    rows = jax.make_array_from_single_device_arrays((len(devices), *local.shape), spread, pieces)
    with jax.set_mesh(mesh):
        gathered = np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(rows))
    owners = [device.process_index for device in devices]
    return gathered[[owners.index(process) for process in range(jax.process_count())]]


def _has_tpu() -> bool:
    vendors = (Path(file) for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)
