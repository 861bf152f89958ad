"""Keeps compiled programs in the user's cache folder, so that a command compiles a program only once.

    ~/.cache/alignvlm/jax-3f9c2a61d0b4/    one folder per kind of CPU, at most 1 GiB each

JAX's persistent compilation cache does the work: its keys hold the program, the versions of JAX and XLA, the compiler's
options and flags, and the devices. They lack the instructions that the CPU offers and the number of cores, on which
XLA's code for CPUs depends. The name of the folder therefore holds a hash of them, and hosts that share a home do not
run each other's code.

Only the `alignvlm` command turns the cache on, never code that imports the library. It does not, if

- ALIGNVLM_CACHE is "off"; any other value is the folder to use instead of ~/.cache/alignvlm;
- JAX's own variables choose a folder or turn the cache off (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE);
- the process is one of several of a run, because on CPUs and GPUs JAX cannot load every program of another process;
- the kind of CPU is not known (no /proc/cpuinfo).

A folder that cannot be written, or that other users can write, turns the cache off with one line, before or during the
work. Anyone who can write to the folder can run code in this process.
"""

import hashlib
import os
import platform
import stat
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from alignvlm_jax.locations import local_path, user_cache_folder
from alignvlm_jax.parallel.launchers import is_multi_host, unjoined_rank

SWITCH = "ALIGNVLM_CACHE"
MAX_BYTES = 1 << 30

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SETTINGS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(MAX_BYTES),
    # The programs of the nano model compile fast, but there are many.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
_CPU_INFO = Path("/proc/cpuinfo")
# Lines about a CPU that tell which code it can run, and for which model LLVM optimizes: of x86-64 and of ARM.
_CPU_LINES = ("vendor_id", "cpu family", "model", "flags")
_CPU_LINES += ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")


def turn_on(environ: MutableMapping[str, str]) -> Path | None:
    """Sets the variables by which JAX, when it is imported, uses the cache. Child processes inherit them.

    Returns:
      The folder; None if the cache stays off.

    Raises:
      LocationError: if ALIGNVLM_CACHE is not a path on a disk.
    """
    folder = cache_folder(environ)
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        _remove_unfinished_entries(folder)
    except OSError as error:
        _warn(f"{folder} ({error.strerror or error})")
        return None
    environ[_FOLDER] = str(folder)
    for name, value in _SETTINGS.items():
        environ.setdefault(name, value)
    _handle_errors(folder)
    return folder


def cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Returns the folder of compiled programs on this machine, or None if the cache should be off."""
    switch = environ.get(SWITCH) or ""
    if switch.lower() in ("off", "0", "false", "no"):
        return None
    if environ.get(_FOLDER) or (environ.get("JAX_ENABLE_COMPILATION_CACHE") or "1").lower() in ("0", "false", "off"):
        return None
    if is_multi_host(environ) or unjoined_rank(environ):
        return None
    kind = kind_of_cpu(environ)
    if kind is None:
        return None
    return (Path(local_path(switch)) if switch else user_cache_folder(environ)).absolute() / f"jax-{kind}"


def kind_of_cpu(environ: Mapping[str, str]) -> str | None:
    """Returns a hash of what XLA's code for this CPU depends on; None if it is not known."""
    try:
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            # All cores have the same block of lines. An empty line ends a block.
            block = [line.split(":", 1) for line in iter(lines.readline, "\n") if ":" in line]
    except OSError:
        return None
    facts = {name.strip(): sorted(value.split()) for name, value in block if name.strip() in _CPU_LINES}
    # XLA divides work by the number of threads, for which NPROC stands.
    facts |= {"machine": platform.machine(), "threads": environ.get("NPROC") or len(os.sched_getaffinity(0))}
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]


def _check_owner(folder: Path) -> None:
    """Raises an OSError if the folder cannot be written, or not only by this user."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("other users can write it")
    if not os.access(folder, os.W_OK):
        raise PermissionError("it cannot be written")


def _remove_unfinished_entries(folder: Path) -> None:
    """Removes what a process that was killed, or a full disk, has left of an entry."""
    names = {path.name for path in folder.iterdir()}
    # JAX writes the time of an entry after the entry. Without it, no entry could be removed or added any more.
    unfinished = [name for name in names if name.endswith("-cache") and f"{name[:-5]}atime" not in names]
    if not unfinished:
        return
    import filelock  # slow to import, and rarely needed

    try:
        # JAX holds this lock while it writes an entry.
        with filelock.FileLock(folder / ".lockfile", timeout=1):
            for name in unfinished:
                if not (folder / f"{name[:-5]}atime").exists():
                    (folder / name).unlink(missing_ok=True)
    except filelock.Timeout:
        pass  # another process is writing


def _handle_errors(folder: Path) -> None:
    """Replaces JAX's warnings about the cache: a broken entry is removed, other errors turn the cache off."""
    show, has_removed = warnings.showwarning, False

    def handle(message, *arguments, **options) -> None:
        nonlocal has_removed
        text = str(message)
        # A process that was killed leaves one broken entry. If XLA refuses more, as it does with its own programs on
        # some CPUs (openxla/xla#44565), it will refuse all.
        if "reading persistent compilation cache entry for '" in text and not has_removed:
            has_removed = _remove_entries(folder, text.split("'")[1])
            if has_removed:
                return
        if "persistent compilation cache entry for '" in text:
            _turn_off()
            _warn(f"{folder} ({text.split(': ', 1)[-1]})")
            return
        show(message, *arguments, **options)

    warnings.showwarning = handle


def _remove_entries(folder: Path, program: str) -> bool:
    """Removes the entries of a program, one of which is broken; returns False if there are none or if that fails."""
    try:
        entries = list(folder.glob(f"{program}-*"))
        for path in entries:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return bool(entries)


def _turn_off() -> None:
    """Turns the cache off for the programs that are compiled from now on."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def _warn(reason: str) -> None:
    advice = f"{SWITCH}=FOLDER chooses another folder, {SWITCH}=off none"
    print(" ".join(f"note: compiled programs are not kept in {reason}; {advice}".split()), file=sys.stderr)
