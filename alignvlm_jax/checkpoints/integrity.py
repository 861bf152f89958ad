"""Detects incomplete and damaged checkpoints by the sizes and SHA-256 digests of their files.

    checkpoints/120/params/...               written by Orbax
    checkpoints/120/digests.0-of-2.json      process 0: size and SHA-256 of each file it wrote, and of this list
    checkpoints/120/digests.1-of-2.json      process 1: the same for its files

A step is *complete* if the digests of all processes exist and every file has the recorded size (`incompleteness`, which
is cheap and reads no arrays). It is *undamaged* if every file also has the recorded digest (`damage`, which reads all
files). Nothing relies on atomic renames, so missing files are detected on object stores as well as on disks.

Digests are computed seconds after the files are written. They detect any later change to the files, but not values that
faulty memory corrupted before the files were written.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_DIGESTS = re.compile(r"digests\.(\d+)-of-(\d+)\.json")
_PROCESS = re.compile(r"process_(\d+)")
_THREADS = 4  # hashlib releases the GIL, so each thread keeps one core busy


def seal(step: Path, process: int = 0, num_processes: int = 1, *, check: Callable[[], None] = lambda: None) -> None:
    """Writes the digests of the files that `process` wrote. The step is complete once all processes have sealed it.

    Args:
      step: folder of the step.
      process: index of this process.
      num_processes: number of processes of the run.
      check: called when the digests are known, before they are written. It raises an error to prevent that.
    """
    files = sorted(
        path.relative_to(step)
        for path in step.rglob("*")
        if path.is_file() and not _DIGESTS.fullmatch(path.name) and _writer(path.relative_to(step)) == process
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda file: _digest(step / file, sync=True), files)
        entries = {
            str(file): {"bytes": (step / file).stat().st_size, "sha256": digest}
            for file, digest in zip(files, digests, strict=True)
        }
    text = json.dumps({"files": entries, "sha256": _digest_of_list(entries)}, indent=1)
    # Syncing a file does not sync its name, which is an entry of its folder.
    for folder in {step.parent, *(step / folder for file in files for folder in file.parents)}:
        _sync(folder)
    check()
    # Write the digests last, once the files themselves would survive a power failure: older steps are deleted as soon
    # as this one is sealed.
    digests_file = step / f"digests.{process}-of-{num_processes}.json"
    digests_file.write_text(text, encoding="utf-8")
    _sync(digests_file)
    _sync(step)


def is_sealed(step: Path) -> bool:
    """Returns whether all processes have written their digests, even if the files were damaged later.

    An unsealed step was never complete, or its deletion was interrupted.
    """
    matches = [match for path in step.glob("digests.*.json") if (match := _DIGESTS.fullmatch(path.name))]
    if not matches or len(matches) < int(matches[0][2]):
        return False
    try:
        # A list that does not end with a brace is truncated.
        return all((step / match[0]).read_bytes().endswith(b"}") for match in matches)
    except OSError:
        return True  # the digests exist, so a read error does not make the step unsealed


def incompleteness(step: Path) -> str | None:
    """Returns why a step is not complete, or None if it is. Checks only the sizes of its files."""
    try:
        for file, entry in _read_digests(step).items():
            path = step / file
            if not path.is_file():
                return f"{file} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{file}: expected {entry['bytes']:,} bytes, got {path.stat().st_size:,}"
    except (OSError, ValueError) as error:
        return _reason(error)
    return None


def damage(step: Path, parts: Sequence[str] = ("",), share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns what is wrong with the files of a step, or None if all of them match their digests.

    Args:
      step: folder of the step.
      parts: folders of the step to check; the complete step by default.
      share: (i, n) checks every n-th file, starting with the i-th, so that n processes can check a step together.
    """
    if reason := incompleteness(step):
        return reason
    entries = _read_digests(step)
    files = sorted(file for file in entries if any(Path(file).is_relative_to(part) for part in parts))
    files = files[share[0] :: share[1]]

    def check(file: str) -> str | None:
        try:
            is_same = _digest(step / file) == entries[file]["sha256"]
        except OSError as error:
            return f"{file} cannot be read ({_reason(error)})"
        return None if is_same else f"{file} does not match its digest"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(check, files)), None)


def wait_for_seals(step: Path, seconds: float = 600) -> None:
    """Waits until all processes have sealed the step.

    The caller must have sealed the step itself: the name of its digest file tells how many processes there are.

    Raises:
      OSError: if another process does not seal the step in time, or if a sealed file is missing or has another size.
    """
    deadline = time.monotonic() + seconds
    # On shared storage, a file may become visible before its content, so an unreadable list is read again.
    while True:
        try:
            _read_digests(step)
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise OSError(errno.ESTALE, f"another process has not written its digests ({error})") from error
        time.sleep(0.05)
    if reason := incompleteness(step):
        raise OSError(errno.EIO, reason)


def remove(step: Path) -> None:
    """Deletes a step."""
    # Delete the digests first, so that after an interrupted deletion the step does not count as complete.
    for path in step.glob("digests.*.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(step, ignore_errors=True)


def _read_digests(step: Path) -> dict[str, dict]:
    """Returns the recorded size and digest of each file, from the lists of all processes.

    Raises:
      OSError: if a list of digests cannot be read.
      ValueError: if one is missing or damaged.
    """
    matches = [match for path in step.glob("digests.*.json") if (match := _DIGESTS.fullmatch(path.name))]
    if not matches:
        raise ValueError("its digests are missing: saving or deleting it was interrupted")
    if missing := set(range(int(matches[0][2]))) - {int(match[1]) for match in matches}:
        raise ValueError(f"the digests of process {min(missing)} are missing: saving it was interrupted")
    entries = {}
    for match in matches:
        try:
            written = json.loads((step / match[0]).read_text(encoding="utf-8"))
            is_intact = written["sha256"] == _digest_of_list(written["files"])
        except (ValueError, KeyError, TypeError):
            is_intact = False
        if not is_intact:
            raise ValueError(f"{match[0]} does not match its digest")
        entries |= written["files"]
    return entries


def _writer(file: Path) -> int:
    """Returns the index of the process that wrote a file."""
    # Orbax writes one folder per process; process 0 writes all other files.
    processes = [match for part in file.parts if (match := _PROCESS.search(part))]
    return int(processes[0][1]) if processes else 0


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are physically on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _digest_of_list(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    # `str` of an OSError would repeat the path.
    return (isinstance(error, OSError) and error.errno and os.strerror(error.errno)) or str(error)
