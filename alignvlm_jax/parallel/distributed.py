"""Several processes as one run: how they find each other, and what they tell each other outside of the training step.

Every process runs the same program on its own devices (`jax.distributed`). Process 0 is the *primary*: it alone prints
and writes what is written once. Alone, a process is primary, and everything here costs nothing.
"""

import atexit
import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import alignvlm_jax
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel.watch import EXIT_CODE, Watch

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_START_SECONDS = 300  # for all hosts to come up
_LEAVE_SECONDS = 60  # for all to come to the end
_LAST_SECONDS = 10  # process 0 waits for the others, when it fails
_HEARTBEAT_SECONDS = 40
"""JAX's own watch, by which a process is aborted if ours (`parallel/watch.py`) could not be set up."""

_GOOGLE_PCI_VENDOR = "0x1ae0"


class MismatchError(UserError):
    """The hosts are not set up alike. Every process raises it."""


class Interrupted(KeyboardInterrupt):
    """A signal came to one of the processes; all of them have saved the same step."""


class Preempted(Interrupted):
    """It was SIGTERM: the machine is wanted elsewhere, and the run is to be started again."""

    exit_code = 75


@contextlib.contextmanager
def initialized(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Within it this process is one of the run's; arguments as of `initialize`.

    When one process fails or dies, the others end too, within a minute, and name its machine. Leaving by an error that
    not all share does not wait for the others: they may be waiting for this process.
    """
    initialize(coordinator, num_processes, process_id)
    if jax.process_count() == 1:
        yield
        return
    watch = _start_watch()
    try:
        yield
    except (MismatchError, Interrupted):
        _leave(watch)
        raise
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        # At exit, after the error has been shown; JAX would wait there for all to come.
        atexit.register(_leave_at_once, watch, text, code)
        raise
    _leave(watch)


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
    if not given and not is_multi_host(os.environ) and not _has_tpu(os.environ):
        return
    if given:
        if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
            raise UserError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id: expected 0 to {num_processes - 1}, got {process_id}")
    # SIGTERM is ours: the training loop agrees on a step to save, and everything else just ends.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would abort the process, with a stack trace, when its own time is up.
    patience = threading.Timer(_START_SECONDS, _give_up, [coordinator, process_id])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=2 * _START_SECONDS,
            # Who is told who takes part needs no cluster, and has all devices of the machine.
            cluster_detection_method="deactivate" if given else None,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_LEAVE_SECONDS,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not is_multi_host(os.environ):
            return  # a TPU that belongs to no pod: JAX found nobody else
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the other processes of the run cannot be found: {reason} (on a TPU that is alone, set "
            "TPU_SKIP_MDS_QUERY=1; elsewhere --coordinator, --num-processes and --process-id say who takes part)"
        ) from error
    finally:
        patience.cancel()


def is_multi_host(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several hosts."""
    tpu_workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    return (
        "JAX_COORDINATOR_ADDRESS" in environ
        or ("SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1)
        or ("KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ)
        or len(tpu_workers.split(",")) > 1
        or int(environ.get("MEGASCALE_NUM_SLICES") or "1") > 1
    )


def is_primary() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def log(text: str, file: TextIO | None = None) -> None:
    """Prints above a progress bar, once for all processes; on standard output if nothing else is said."""
    if is_primary():
        tqdm.write(text, file=file)


def gather_json(value: Any) -> list[Any]:
    """What every process says, in the order of the processes; all must call it at the same point, and wait there.

    Args:
      value: anything JSON can hold.
    """
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    me, everyone = jax.process_index(), range(jax.process_count())
    lengths = np.zeros(len(everyone), np.int32)
    lengths[me] = len(text)
    lengths = np.asarray(_sum(lengths))
    # Padded to a power of two, so that few lengths are compiled for.
    rows = np.zeros((len(everyone), 1 << int(lengths.max()).bit_length()), np.uint8)
    rows[me, : len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(_sum(rows))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def sum_over_processes(values: dict[str, float]) -> dict[str, Any]:
    """The sums over all processes, which all must ask for at the same point. Nobody waits: they are arrays to come."""
    if jax.process_count() == 1:
        return dict(values)
    return _sum({name: np.float32(value) for name, value in values.items()})


def require_equal(experiment: Mapping[str, Any]) -> None:
    """Sees to it that all processes are about to do the same, before the first step; all must call it.

    Compared are the config (by its hash; where that differs, key by key), library versions and devices.

    Args:
      experiment: the config, as nested dicts and lists, under the names that messages show.

    Raises:
      MismatchError: on every process, with the machines that differ and in what.
    """
    if jax.process_count() == 1:
        return
    facts = {
        "alignvlm_jax": alignvlm_jax.__version__,
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "Python": platform.python_version(),
        "devices of its own": jax.local_device_count(),
        "devices in all": jax.device_count(),
        "kind of device": jax.local_devices()[0].device_kind,
    }
    text = json.dumps(experiment, sort_keys=True)
    said = gather_json([socket.gethostname(), facts, hashlib.sha256(text.encode()).hexdigest()])
    hosts, facts, hashes = zip(*said, strict=True)
    differences = describe_differences(hosts, facts)
    if len(set(hashes)) > 1:
        flat = gather_json(dict(_leaves(experiment)))
        differences = ". ".join(filter(None, (differences, describe_differences(hosts, flat))))
    if differences:
        raise MismatchError(f"the hosts do not agree, nothing was started: {differences}")


def describe_differences(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> str:
    """Which processes differ from most, and in what; "" if none does.

    before: ["a", "b", "c"], [{"jax": "0.10.2"}, {"jax": "0.10.2"}, {"jax": "0.10.1"}]
    after:  "jax: 0.10.2 on most; 0.10.1 on c (process 2)"
    """
    lines = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values = [str(fact.get(name)) for fact in facts]
        usual = max(values, key=values.count)
        odd = [
            f"{value} on {host} (process {process})"
            for process, (host, value) in enumerate(zip(hosts, values, strict=True))
            if value != usual
        ]
        if odd:
            where = f"on {hosts[values.index(usual)]} (process {values.index(usual)})"
            usually = "on most" if values.count(usual) > len(values) / 2 else where
            shown = f"{', '.join(odd[:5])}{f' and {len(odd) - 5} more' if len(odd) > 5 else ''}"
            lines.append(f"{name}: {usual} {usually}; {shown}")
    return ". ".join(lines)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """{"mesh": {"data": 2}} -> ("mesh.data", 2)."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _sum(local: Any) -> Any:
    """A tree of arrays, added up over the processes, everywhere."""
    mesh = Mesh(np.array(jax.devices()), "devices", axis_types=(AxisType.Auto,))
    spread, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("devices"), PartitionSpec()))
    devices = jax.local_devices()

    def place(leaf):  # the first device of each process carries its part, the others zeros
        pieces = [leaf[None] if device == devices[0] else np.zeros_like(leaf)[None] for device in devices]
        placed = [jax.device_put(piece, device) for piece, device in zip(pieces, devices, strict=True)]
        return jax.make_array_from_single_device_arrays((mesh.size, *leaf.shape), spread, placed)

    with jax.set_mesh(mesh):
        return jax.jit(_sum_rows, out_shardings=everywhere)(jax.tree.map(place, local))


def _sum_rows(tree: Any) -> Any:
    return jax.tree.map(lambda rows: jax.numpy.sum(rows, axis=0, dtype=rows.dtype), tree)


def _start_watch() -> Watch:
    """Has this process and the others watch over each other; all must call it."""
    watch = Watch(on_lost=lambda: os._exit(EXIT_CODE))
    said = {"host": socket.gethostname(), "addresses": _addresses(), "port": watch.port, "token": secrets.token_hex(16)}
    hosts = gather_json(said)
    first = hosts[0]
    watch.start(
        process=jax.process_index(),
        hosts=[host["host"] for host in hosts],
        addresses=first["addresses"] if first["host"] != said["host"] else ["localhost", *first["addresses"]],
        port=first["port"],
        token=first["token"],
    )
    return watch


def _leave(watch: Watch) -> None:
    """All come here: the end of the run."""
    jax.distributed.shutdown()
    watch.left()


def _leave_at_once(watch: Watch, text: str, code: int) -> None:
    """Ends this process without the others. Process 0 is the last to go: JAX aborts the others when it is gone."""
    watch.failed(text, wait_seconds=_LAST_SECONDS if is_primary() else 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _addresses() -> list[str]:
    """Under which names and numbers this machine may be known to others, the likeliest first."""
    found = [socket.gethostname(), socket.getfqdn()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks which of its addresses leads outside
            found.insert(0, probe.getsockname()[0])
        except OSError:
            pass  # no way outside
    return list(dict.fromkeys(found))


def _give_up(coordinator: str | None, process_id: int | None) -> None:
    me = "this process" if process_id is None else f"process {process_id}"
    where = coordinator or "the first host of the cluster"
    print(
        f"\nalignvlm: error: {me} has waited {_START_SECONDS} s for the others of the run, at {where}: see that all of "
        "them are started, each with its own number, and that they can reach that host and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this is a TPU's host. The hosts of a pod that was made as a VM are told so by a server that JAX asks."""
    if not (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu"):
        return False
    vendors = (Path(file) for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)
