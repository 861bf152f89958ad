"""Explains an out-of-memory error, and saves a profile of the device memory."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage.errors import translated_errors

MEMORY_PROFILE = "out_of_memory.prof"
"""File in the workdir with a profile of the device memory, in pprof's format."""

# Sizes in XLA's messages: "Used 21.95G of 15.48G hbm", "allocate 4770354232 bytes", "allocate request for 2.99GiB".
_SIZE = r"([\d.]+)\s?(bytes|[KMGT]?i?B?)\b"
_PROGRAM_SIZE = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_ALLOCATION_SIZE = re.compile(rf"(?:allocat(?:e|ing)|reserve)(?: request for)? {_SIZE}")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@contextlib.contextmanager
def explain_errors(config: ExperimentConfig, workdir: Path) -> Iterator[None]:
    """Turns an out-of-memory error of the compiler or of a program into a `UserError`, and saves a memory profile.

    The error says how much memory was needed (if XLA does), where the profile is, and which keys of the config to
    change.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        profile = workdir / MEMORY_PROFILE
        # A failure to save the profile must not hide the out-of-memory error.
        try:
            with translated_errors(str(profile)):
                profile.write_bytes(jax.profiler.device_memory_profile())
            profile_note = f"a memory profile is in {profile} (pprof -top {profile})"
        except (OSError, RuntimeError, UserError) as problem:
            profile_note = f"no memory profile ({problem})"
        raise UserError(f"out of memory: {needed_memory(str(error))}; {profile_note}; {remedies(config)}") from error


def needed_memory(message: str) -> str:
    """Returns how much memory was needed, according to XLA's message.

        before: "RESOURCE_EXHAUSTED: ... Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G. ..."
        after:  "the program needs 21.95 GiB on each device, which has 15.48 GiB"

    A message that does not say how much is reduced to its first line.
    """
    if match := _PROGRAM_SIZE.search(message):
        return f"the program needs {_gib(*match.groups()[:2])} on each device, which has {_gib(*match.groups()[2:])}"
    if match := _ALLOCATION_SIZE.search(message):
        return f"{_gib(*match.groups())} were requested at once, more than is free on the device{_in_use()}"
    return message.strip().splitlines()[0]


def remedies(config: ExperimentConfig) -> str:
    """Returns a sentence with the changes of the config that save memory, the cheapest first."""
    changes = []
    if config.data.packing.bins_per_microbatch > 1:
        changes.append(
            f"fewer config.data.packing.bins_per_microbatch (now {config.data.packing.bins_per_microbatch}; the global "
            "batch stays as it is)"
        )
    for part in ("vision", "language"):
        model = getattr(config.model, part)
        if model.remat != "full":
            changes.append(f'config.model.{part}.remat=full (now "{model.remat}")')
        if model.dtype == "float32" and jax.default_backend() != "cpu":
            changes.append(f"config.model.{part}.dtype=bfloat16")
    changes.append(f"a larger config.mesh.fsdp, or tensor, on more devices (now {config.mesh.describe()})")
    return "try " + "; ".join(changes)


def _gib(number: str, unit: str) -> str:
    size = float(number) * (1 if unit == "bytes" else _UNITS.get(unit[:1], 1)) / 2**30
    return f"{size:.2f} GiB" if size >= 0.01 else f"{size * 2**10:.2f} MiB"


def _in_use() -> str:
    stats = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
    if "bytes_in_use" not in stats or "bytes_limit" not in stats:
        return ""
    return f" ({_gib(str(stats['bytes_in_use']), 'bytes')} of {_gib(str(stats['bytes_limit']), 'bytes')} are in use)"
