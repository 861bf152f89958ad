"""Is a checkpoint on disk what was written? Digests of its files, without which it does not count as complete.

    checkpoints/120/params/...               what Orbax wrote
    checkpoints/120/digests.0-of-2.json      process 0: size and SHA-256 of each file it wrote, and of this list
    checkpoints/120/digests.1-of-2.json      process 1, likewise

A step is *complete* once the digests of all processes are there and every file has its size (`incompleteness`: cheap,
nothing is read). It is *undamaged* if every file has its digest too (`damage`: reads everything). Nothing here relies
on a rename: whatever part of a step is missing, it is seen to be missing, on a disk as in an object store.

What is caught is all that happens to the files once their digests are taken, seconds after they were written. What a
broken memory did to the numbers before that is not.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

_DIGESTS = re.compile(r"digests\.(\d+)-of-(\d+)\.json")
_OF_PROCESS = re.compile(r"process_(\d+)")
_THREADS = 4  # hashlib lets go of the interpreter: a core each


def seal(step: Path, process: int = 0, num_processes: int = 1) -> None:
    """Writes down the digests of the files that `process` wrote; the step is complete once all processes have."""
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
    for folder in {step.parent, *(step / folder for file in files for folder in file.parents)}:
        _sync(folder)
    # Last, and only once the files themselves would survive the power going: older steps are deleted upon it.
    digests = step / f"digests.{process}-of-{num_processes}.json"
    digests.write_text(text, encoding="utf-8")
    _sync(digests)
    _sync(step)


def is_sealed(step: Path) -> bool:
    """Whether all processes had written their digests, whatever became of the files since.

    A step that is not was never complete: whoever saved it was killed meanwhile, or whoever deleted it.
    """
    found = [match for path in step.glob("digests.*.json") if (match := _DIGESTS.fullmatch(path.name))]
    if not found or len(found) < int(found[0][2]):
        return False
    try:
        return all((step / match[0]).read_bytes().endswith(b"}") for match in found)  # else torn
    except OSError:
        return True  # there, and cannot be read


def incompleteness(step: Path) -> str | None:
    """Why a step is not complete; None if it is. Files are counted and measured, not read."""
    try:
        for file, entry in _read_digests(step).items():
            path = step / file
            if not path.is_file():
                return f"{file} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{file} has {path.stat().st_size:,} bytes, {entry['bytes']:,} were written"
    except (OSError, ValueError) as error:
        return _reason(error)
    return None


def damage(step: Path, parts: Sequence[str] = ("",), share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a step; None if they are what was written.

    Args:
      step: its folder.
      parts: only what lies in these folders of it.
      share: (i, n): every nth file from the ith on, for n processes that do it together.
    """
    if reason := incompleteness(step):
        return reason
    entries = _read_digests(step)
    files = sorted(file for file in entries if any(Path(file).is_relative_to(part) for part in parts))
    files = files[share[0] :: share[1]]

    def check(file: str) -> str | None:
        try:
            same = _digest(step / file) == entries[file]["sha256"]
        except OSError as error:
            return f"{file} cannot be read ({_reason(error)})"
        return None if same else f"{file} is not what was written"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(check, files)), None)


def wait_for_seals(step: Path, seconds: float = 600) -> None:
    """Until all processes have sealed the step; one has, and its digests say how many there are.

    Raises:
      OSError: one of them did not.
    """
    deadline = time.monotonic() + seconds
    while True:  # a file is seen before what is in it
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
    """Deletes a step, so that it is not complete any more from the first moment on."""
    for path in step.glob("digests.*.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(step, ignore_errors=True)


def _read_digests(step: Path) -> dict[str, dict]:
    """The entries of all processes.

    Raises:
      OSError, ValueError: they are not all there, or not what was written.
    """
    found = [match for path in step.glob("digests.*.json") if (match := _DIGESTS.fullmatch(path.name))]
    if not found:
        raise ValueError("its digests are missing: it was not finished, or its deletion was not")
    if missing := set(range(int(found[0][2]))) - {int(match[1]) for match in found}:
        raise ValueError(f"the digests of process {min(missing)} are missing: it was not finished")
    entries = {}
    for match in found:
        try:
            written = json.loads((step / match[0]).read_text(encoding="utf-8"))
            whole = written["sha256"] == _digest_of_list(written["files"])
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{match[0]} is not what was written")
        entries |= written["files"]
    return entries


def _writer(file: Path) -> int:
    """The process that wrote a file: Orbax has folders for each, and leaves the rest to process 0."""
    found = [match for part in file.parts if (match := _OF_PROCESS.search(part))]
    return int(found[0][1]) if found else 0


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Sees to it that a file, or the names in a folder, are on the disk and not only on their way."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing for folders
            raise
    finally:
        os.close(handle)


def _digest_of_list(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.errno and os.strerror(error.errno)) or str(error)
