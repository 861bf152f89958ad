"""Detects incomplete and damaged checkpoints by the sizes and digests of their files.

    checkpoints/120/params/...               written by Orbax
    checkpoints/120/digests.0-of-2.json      process 0: size and digest of each file it wrote, and of this list
    checkpoints/120/digests.1-of-2.json      process 1: the same for its files

A step is *complete* if the digests of all processes exist and every file has the recorded size (`incompleteness`, which
is cheap and reads no arrays). It is *undamaged* if every file also has the recorded digest (`damage`). On a disk this
reads all files; a bucket lists the checksums of its objects (`step_files.py`). Nothing relies on renames, so missing
files are detected in buckets as well as on disks.

Digests are computed seconds after the files are written. They detect any later change to the files, but not values that
faulty memory corrupted before the files were written.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from alignvlm_jax.checkpoints.step_files import Record, StepFiles, remove_folder, step_files, writer_of
from alignvlm_jax.locations import is_bucket

_DIGESTS = re.compile(r"digests\.(\d+)-of-(\d+)\.json")
_LISTS = "digests.*.json"
_THREADS = 4  # hashlib releases the GIL, so each thread keeps one core busy
_POLL_SECONDS, _POLL_SECONDS_OF_BUCKETS = 0.05, 1.0  # in a bucket, looking costs a request


def seal(step: Path, process: int = 0, num_processes: int = 1, *, check: Callable[[], None] = lambda: None) -> None:
    """Writes the digests of the files that `process` wrote. The step is complete once all processes have sealed it.

    Args:
      step: folder of the step.
      process: index of this process.
      num_processes: number of processes of the run.
      check: called when the digests are known, before they are written. It raises an error to prevent that.
    """
    files = step_files(step)
    own = sorted(name for name in files.names() if not _is_list(name) and writer_of(name) == process)
    records = files.record(own)
    text = json.dumps({"files": records, "sha256": _digest_of_list(records)}, indent=1)
    check()
    # Write the digests last, once the files themselves would survive a power failure: older steps are deleted as soon
    # as this one is sealed.
    files.write_last(f"digests.{process}-of-{num_processes}.json", text)


def is_sealed(step: Path) -> bool:
    """Returns whether all processes have written their digests, even if the files were damaged later.

    An unsealed step was never complete, or its deletion was interrupted.
    """
    files = step_files(step)
    matches = _lists(files)
    if not matches or len(matches) < int(matches[0][2]):
        return False
    try:
        # A list that does not end with a brace is truncated.
        return all(files.read(match[0]).endswith(b"}") for match in matches)
    except OSError:
        return True  # the digests exist, so a read error does not make the step unsealed


def incompleteness(step: Path) -> str | None:
    """Returns why a step is not complete, or None if it is. Checks only the sizes of its files."""
    try:
        files = step_files(step)
        return _incompleteness(files, _read_digests(files))
    except (OSError, ValueError) as error:
        return _reason(error)


def damage(step: Path, parts: Sequence[str] = ("",), share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns what is wrong with the files of a step, or None if all of them match their digests.

    Args:
      step: folder of the step.
      parts: folders of the step to check; the complete step by default.
      share: (i, n) checks every n-th file, starting with the i-th, so that n processes can check a step together.
    """
    try:
        files = step_files(step)
        records = _read_digests(files)
        if reason := _incompleteness(files, records):
            return reason
    except (OSError, ValueError) as error:
        return _reason(error)
    names = sorted(name for name in records if any(Path(name).is_relative_to(part) for part in parts))
    names = names[share[0] :: share[1]]

    def check(name: str) -> str | None:
        try:
            is_same = files.is_unchanged(name, records[name])
        except OSError as error:
            return f"{name} cannot be read ({_reason(error)})"
        return None if is_same else f"{name} does not match its digest"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(check, names)), None)


def seal_identity(step: Path) -> str:
    """Returns a text that changes if another run seals a step of the same name."""
    files = step_files(step)
    return " ".join(files.identity(match[0]) for match in _lists(files))


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
            _read_digests(step_files(step))
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise OSError(errno.ESTALE, f"another process has not written its digests ({error})") from error
        time.sleep(_POLL_SECONDS_OF_BUCKETS if is_bucket(step) else _POLL_SECONDS)
    if reason := incompleteness(step):
        raise OSError(errno.EIO, reason)


def remove(step: Path) -> None:
    """Deletes a step."""
    # Delete the digests first, so that after an interrupted deletion the step does not count as complete.
    remove_folder(step, first=_LISTS)


def _incompleteness(files: StepFiles, records: dict[str, Record]) -> str | None:
    for name, record in records.items():
        size = files.size(name)
        if size is None:
            return f"{name} is missing"
        if size != record["bytes"]:
            return f"{name}: expected {record['bytes']:,} bytes, got {size:,}"
    return None


def _lists(files: StepFiles) -> list[re.Match[str]]:
    return [match for name in sorted(files.matching(_LISTS)) if (match := _DIGESTS.fullmatch(name))]


def _read_digests(files: StepFiles) -> dict[str, Record]:
    """Returns the recorded size and digest of each file, from the lists of all processes.

    Raises:
      OSError: if a list of digests cannot be read.
      ValueError: if one is missing or damaged.
    """
    matches = _lists(files)
    if not matches:
        raise ValueError("its digests are missing: saving or deleting it was interrupted")
    if missing := set(range(int(matches[0][2]))) - {int(match[1]) for match in matches}:
        raise ValueError(f"the digests of process {min(missing)} are missing: saving it was interrupted")
    entries = {}
    for match in matches:
        try:
            written = json.loads(files.read(match[0]))
            is_intact = written["sha256"] == _digest_of_list(written["files"])
        except (ValueError, KeyError, TypeError):
            is_intact = False
        if not is_intact:
            raise ValueError(f"{match[0]} does not match its digest")
        entries |= written["files"]
    return entries


def _is_list(name: str) -> bool:
    return _DIGESTS.fullmatch(name) is not None


def _digest_of_list(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    # `str` of an OSError would repeat the path.
    return (isinstance(error, OSError) and error.errno and os.strerror(error.errno)) or str(error)
