"""Coordinates the processes of one run: start-up, shutdown, and the values they exchange outside the training step.

Every process runs the same program on its own devices (`jax.distributed`). Process 0 is the *primary*: only it prints,
and only it writes the files that exist once per run. In a run of one process, that process is the primary, and the
functions of this module return at once.
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
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.parallel.launchers import detection_method, is_multi_host, unjoined_rank
from alignvlm_jax.parallel.watch import EXIT_CODE, Watch

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_START_SECONDS = 300  # time for all hosts to start
_SHUTDOWN_SECONDS = 60  # time for all processes to reach the end of the run
_FAILURE_SECONDS = 10  # time that a failing process 0 waits for the others
_HEARTBEAT_SECONDS = 40
"""Timeout of JAX's own watch. It aborts a process if ours (`parallel/watch.py`) could not be set up."""

_GOOGLE_PCI_VENDOR = "0x1ae0"


class MismatchError(UserError):
    """Raised in every process if the processes do not have the same settings."""

    is_common = True


class Interrupted(KeyboardInterrupt):
    """Raised in every process, after all have saved the same step, if one of them received a signal."""

    is_common = True


class Preempted(Interrupted):
    """Raised if the signal was SIGTERM: the machine is being reclaimed, and the run should be started again."""

    exit_code = TemporaryError.exit_code


@contextlib.contextmanager
def initialized(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Connects this process to the run for the duration of a `with` block.

    When one process fails or dies, the others end within a minute and name its machine. An error that may concern only
    this process leaves the block without waiting for the others, because they may be waiting for this process.

    Args:
      coordinator: see `initialize`.
      num_processes: see `initialize`.
      process_id: see `initialize`.
    """
    initialize(coordinator, num_processes, process_id)
    if jax.process_count() == 1:
        yield
        return
    watch = _start_watch()
    try:
        yield
    except BaseException as error:
        if getattr(error, "is_common", False):
            # Every process raises it, so the normal shutdown, which waits for all processes, works.
            _shut_down(watch)
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        default_code = 130 if isinstance(error, KeyboardInterrupt) else 1
        code = getattr(error, "exit_code", default_code)
        # When exit handlers run, the error has been printed. Handlers run in reverse order of registration, so ours
        # runs before JAX's, which would wait for all processes.
        atexit.register(_exit_at_once, watch, text, code)
        raise
    _shut_down(watch)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects to the other processes of the run. Call it before any other use of JAX.

    A single process returns at once.

    TPU pods (queued resources, GKE), indexed Kubernetes jobs, Slurm (one task per GPU) and Open MPI up to version 4 are
    detected, and JAX reads the list of processes from them. Elsewhere, pass all three arguments on every host.

    Args:
      coordinator: HOST:PORT of process 0; the port must be free on that host.
      num_processes: number of processes. 1 alone makes this process a run of its own, whatever started it.
      process_id: index of this process, counted from 0.

    Raises:
      UserError: if the arguments are incomplete or invalid, if the other processes cannot be reached, or if this is one
        of several ranks that JAX cannot find.
    """
    arguments = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    given = [name for name, value in arguments.items() if value is not None]
    if given == ["--num-processes"] and num_processes == 1:
        return  # whatever the environment says
    if given and len(given) < len(arguments):
        missing = " and ".join(name for name in arguments if name not in given)
        raise UserError(
            f"{', '.join(given)} without {missing}: a run of several processes needs all three flags, "
            "a run of one process needs none"
        )
    if not given and (problem := unjoined_rank(os.environ)):
        raise UserError(problem)
    if not given and not is_multi_host(os.environ) and not _has_tpu(os.environ):
        return
    if given:
        if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
            raise UserError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id: expected 0 to {num_processes - 1}, got {process_id}")
    # SIGTERM is handled in this package: the training loop agrees on a step to save, and other commands just end.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own timeout aborts the process with a stack trace. This shorter one prints a message first.
    timeout = threading.Timer(_START_SECONDS, _give_up, [coordinator, process_id])
    timeout.daemon = True
    timeout.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=2 * _START_SECONDS,
            # With explicit arguments, clusters are not detected, and the process gets all devices of its machine.
            cluster_detection_method="deactivate" if given else detection_method(os.environ),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and not is_multi_host(os.environ):
            return  # a TPU outside of any pod: JAX found no other process
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the other processes of the run cannot be found: {reason} (on a single TPU host, set "
            "TPU_SKIP_MDS_QUERY=1; elsewhere, pass --coordinator, --num-processes and --process-id)"
        ) from error
    finally:
        timeout.cancel()


def is_primary() -> bool:
    """Returns whether this process prints and writes for all processes."""
    return jax.process_index() == 0


def log(text: str, file: TextIO | None = None) -> None:
    """Prints a line above any progress bar, in process 0 only.

    Args:
      text: the line.
      file: stream to print it to; None means standard output.
    """
    if is_primary():
        tqdm.write(text, file=file)


def gather_json(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of the processes. All must call it at the same point.

    Args:
      value: any value that JSON can represent.
    """
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    me, everyone = jax.process_index(), range(jax.process_count())
    # Each process fills its own row and leaves zeros elsewhere, so a sum collects all rows. The lengths are exchanged
    # first, because the arrays of the second sum must have the same shape in every process.
    lengths = np.zeros(len(everyone), np.int32)
    lengths[me] = len(text)
    lengths = np.asarray(_sum(lengths))
    # Rows are padded to a power of two, so that the sum is compiled for few shapes.
    rows = np.zeros((len(everyone), 1 << int(lengths.max()).bit_length()), np.uint8)
    rows[me, : len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(_sum(rows))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def sum_over_processes(values: dict[str, float]) -> dict[str, Any]:
    """Returns the sum of each value over all processes. All must call it at the same point.

    The call does not block: it returns arrays that are still being computed.
    """
    if jax.process_count() == 1:
        return dict(values)
    return _sum({name: np.float32(value) for name, value in values.items()})


def require_equal(experiment: Mapping[str, Any]) -> None:
    """Checks, before the first step, that all processes have the same settings. All processes must call it.

    The check compares the config (by its hash, then key by key if the hashes differ), library versions and devices.

    Args:
      experiment: the config as nested dicts and lists, with the names that messages should show.

    Raises:
      MismatchError: if any process differs; raised in every process, naming the machines and the differences.
    """
    if jax.process_count() == 1:
        return
    facts = {
        "alignvlm_jax": alignvlm_jax.__version__,
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        "Python": platform.python_version(),
        "local devices": jax.local_device_count(),
        "global devices": jax.device_count(),
        "device kind": jax.local_devices()[0].device_kind,
    }
    # Sort the keys, because equal configs must have equal texts.
    text = json.dumps(experiment, sort_keys=True)
    gathered = gather_json([socket.gethostname(), facts, hashlib.sha256(text.encode()).hexdigest()])
    hosts, facts, hashes = zip(*gathered, strict=True)
    differences = describe_differences(hosts, facts)
    # Whole configs are sent only if their hashes differ.
    if len(set(hashes)) > 1:
        flat = gather_json(dict(_leaves(experiment)))
        differences = ". ".join(filter(None, (differences, describe_differences(hosts, flat))))
    if differences:
        raise MismatchError(f"the processes have different settings, so nothing was started: {differences}")


def describe_differences(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> str:
    """Returns a text that says which processes differ from the majority, and in what; "" if none does.

        hosts, facts    ["a", "b", "c"], [{"jax": "0.10.2"}, {"jax": "0.10.2"}, {"jax": "0.10.1"}]
        result          "jax: 0.10.2 on most; 0.10.1 on c (process 2)"

    Args:
      hosts: host name of each process.
      facts: the facts to compare, by their names, of each process.
    """
    lines = []
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values = [str(fact.get(name)) for fact in facts]
        usual = max(values, key=values.count)
        outliers = [
            f"{value} on {host} (process {process})"
            for process, (host, value) in enumerate(zip(hosts, values, strict=True))
            if value != usual
        ]
        if outliers:
            first_usual = f"on {hosts[values.index(usual)]} (process {values.index(usual)})"
            # If there is no majority, as with two processes, the message names a host for each value.
            usual_hosts = "on most" if values.count(usual) > len(values) / 2 else first_usual
            shown = f"{', '.join(outliers[:5])}{f' and {len(outliers) - 5} more' if len(outliers) > 5 else ''}"
            lines.append(f"{name}: {usual} {usual_hosts}; {shown}")
    return ". ".join(lines)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and value of each leaf: {"mesh": {"data": 2}} -> ("mesh.data", 2)."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _sum(local: Any) -> Any:
    """Returns a tree of arrays summed over the processes, replicated on all devices."""
    mesh = Mesh(np.array(jax.devices()), "devices", axis_types=(AxisType.Auto,))
    row_sharding, replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec("devices"), PartitionSpec()))
    devices = jax.local_devices()

    def place(leaf):
        # The sum is over devices, but each process must count once: its first device holds its value, all others zeros.
        pieces = [leaf[None] if device == devices[0] else np.zeros_like(leaf)[None] for device in devices]
        placed = [jax.device_put(piece, device) for piece, device in zip(pieces, devices, strict=True)]
        return jax.make_array_from_single_device_arrays((mesh.size, *leaf.shape), row_sharding, placed)

    with jax.set_mesh(mesh):
        return jax.jit(_sum_rows, out_shardings=replicated)(jax.tree.map(place, local))


def _sum_rows(tree: Any) -> Any:
    # An explicit dtype, because `jnp.sum` would widen uint8 to uint32.
    return jax.tree.map(lambda rows: jax.numpy.sum(rows, axis=0, dtype=rows.dtype), tree)


def _start_watch() -> Watch:
    """Starts the mutual watch of all processes. All of them must call it."""
    # `os._exit` works from a thread while the main thread is stuck in a collective; an exception would not.
    watch = Watch(on_lost=lambda: os._exit(EXIT_CODE))
    # Every process sends its addresses and a token, because all must make the same call. Those of process 0 are used.
    here = {"host": socket.gethostname(), "addresses": _addresses(), "port": watch.port, "token": secrets.token_hex(16)}
    hosts = gather_json(here)
    first = hosts[0]
    watch.start(
        process=jax.process_index(),
        hosts=[host["host"] for host in hosts],
        # On the same machine, the loopback interface works even without a network.
        addresses=first["addresses"] if first["host"] != here["host"] else ["localhost", *first["addresses"]],
        port=first["port"],
        token=first["token"],
    )
    return watch


def _shut_down(watch: Watch) -> None:
    """Disconnects this process from the run. All processes must call it; they wait for each other."""
    jax.distributed.shutdown()
    watch.report_done()


def _exit_at_once(watch: Watch, text: str, code: int) -> None:
    """Ends this process without waiting for the others to reach the end of the run."""
    # Process 0 must end last: JAX aborts the others as soon as it is gone, before they can print a message.
    watch.report_failure(text, wait_seconds=_FAILURE_SECONDS if is_primary() else 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: JAX's exit handler would wait for the other processes.
    os._exit(code)


def _addresses() -> list[str]:
    """Returns host names and IP addresses by which others may reach this machine, the most likely first."""
    addresses = [socket.gethostname(), socket.getfqdn()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a UDP socket sends nothing. It only selects the local address that leads outside.
            probe.connect(("192.0.2.1", 9))
            addresses.insert(0, probe.getsockname()[0])
        except OSError:
            pass  # the machine has no route to the outside
    return list(dict.fromkeys(addresses))


def _give_up(coordinator: str | None, process_id: int | None) -> None:
    """Prints that the other processes did not start in time, and ends this process."""
    me = "this process" if process_id is None else f"process {process_id}"
    where = coordinator or "the first host of the cluster"
    print(
        f"\nalignvlm: error: {me} has waited {_START_SECONDS} s for the other processes of the run, at {where}: check "
        "that all of them have been started, each with a different --process-id, and that they can reach that host "
        "and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _has_tpu(environ: Mapping[str, str]) -> bool:
    """Returns whether this machine is the host of a TPU.

    On the hosts of a pod that was created as TPU VMs, no environment variable says so. Only a metadata server knows,
    which JAX queries.
    """
    if not (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu"):
        return False
    # TPUs are PCI devices of Google.
    vendors = (Path(file) for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors)
