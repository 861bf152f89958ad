"""Groups of records that show the same images, found by the digests of the encoded images.

Axis letters: N records of a data set, n of them that one process reads.

All records are read once to find the groups. The result is a small file, so later runs read only that (`cached` and
`store_cache`): in the folder of the data set, or in the user's cache where that folder is read-only. Several processes
read a share of the records each, and exchange the digests (`training/experiment_data.py`).

    record       0      1     2      3      4
    images       cat    dog   none   cat    none
    first        0      1     2      0      4        first record with the same images
    groups       [0 3]  [1]   [2]    [4]             in tree or conversation mode, at most X questions each

Equal digests only suggest a group: `examples.py` compares the images themselves. An outdated file can therefore cost
speed, but it cannot show a question the wrong page.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt32

from alignvlm_jax.data.conversations import Record, Task, encoded_images
from alignvlm_jax.data.paths import atomic_file
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location, user_cache_folder
from alignvlm_jax.progress import progress_bar

Grouping = Literal["off", "tree", "conversation"]
"""Values of `DataConfig.group_questions`."""

# Records per task of a thread.
_CHUNK = 64

_log = logging.getLogger(__name__)


class Scan(NamedTuple):
    """Digests of the records' images, and the number of questions of each record. A record without images has zeros."""

    digests: UInt32[np.ndarray, "n 2"]
    questions: Int[np.ndarray, " n"]


class SameImages(NamedTuple):
    """The first record that shows the same images, and the number of questions, of each record."""

    first: Int[np.ndarray, " N"]
    questions: Int[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True, eq=False)
class RecordGroups:
    """Groups of a data set's records, in the order of their first records.

    Attributes:
      members: the records, group by group.
      ends: end of each group in `members`.
      num_questions: expected number of questions of all groups together, which the weights of a mixture refer to.
    """

    members: Int[np.ndarray, " N"]
    ends: Int[np.ndarray, " g"]
    num_questions: float

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, group: int) -> list[int]:
        """Returns the records of a group."""
        return self.members[self.ends[group - 1] if group else 0 : self.ends[group]].tolist()


def scan(records: Sequence[Record], share: range, *, name: str = "", threads: int = 2, progress: bool = False) -> Scan:
    """Reads some records and returns the digests of their images.

    Args:
      records: the records of a data set.
      share: indices of the records to read.
      name: name of the data set in the progress bar.
      threads: number of records to read at a time.
      progress: whether to show a progress bar if reading takes seconds.
    """
    chunks = [share[start : start + _CHUNK] for start in range(0, len(share), _CHUNK)]
    pool = concurrent.futures.ThreadPoolExecutor(threads, "group")
    try:
        scans = pool.map(lambda chunk: [_scan_record(records[index]) for index in chunk], chunks)
        title = f"grouping {name} by image"
        bar = progress_bar(
            scans, title, total=len(chunks), unit_scale=_CHUNK, unit="record", delay=2, show=progress and bool(chunks)
        )
        found = [entry for chunk in bar for entry in chunk]
    finally:
        pool.shutdown(cancel_futures=True)
    digests = np.frombuffer(b"".join(digest for digest, _ in found), np.uint32).reshape(-1, 2)
    return Scan(digests, np.array([questions for _, questions in found], np.int32))


def _scan_record(record: Record) -> tuple[bytes, int]:
    """Returns the digest of a record's images, 8 bytes, and its number of questions."""
    images = encoded_images(record)
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        digest.update(len(image).to_bytes(8, "little") + image)
    questions = record.get("questions")
    return (
        digest.digest() if len(images) else bytes(8),
        max(1, len(questions)) if isinstance(questions, Sequence | np.ndarray) else 1,
    )


def match(scan: Scan) -> SameImages:
    """Returns which records of a completely scanned data set show the same images."""
    first = np.arange(len(scan.questions), dtype=np.int32)
    digests = np.ascontiguousarray(scan.digests).view(np.uint64)[:, 0]
    _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return SameImages(np.where(digests, firsts[inverse], first).astype(np.int32), scan.questions.astype(np.int32))


def make_groups(same: SameImages, task: Task, grouping: Grouping, max_questions: int) -> RecordGroups:
    """Returns the groups of a data set for a task.

    Args:
      same: which records show the same images.
      task: task of the examples.
      grouping: "tree" or "conversation".
      max_questions: largest number of questions in a group; a larger one is split. It bounds the records that are read
        for one example, even if a thousand records show one blank image.
    """
    members = np.argsort(same.first, kind="stable").astype(np.int32)
    questions = np.ones(len(members)) if grouping == "conversation" else _num_branches(same.questions, task)
    ends, start = [], 0
    for stop in [*(np.flatnonzero(np.diff(same.first[members])) + 1).tolist(), len(members)]:
        # Parts of about equal size: one more begins whenever the questions so far exceed its share.
        so_far = np.cumsum(questions[members[start:stop]])
        parts = max(1, int(np.ceil(so_far[-1] / max_questions))) if stop > start else 1
        cuts = np.searchsorted(so_far, so_far[-1] * np.arange(1, parts) / parts, side="right") if parts > 1 else []
        ends += sorted({start + int(cut) for cut in cuts if 0 < cut < stop - start} | {stop})
        start = stop
    return RecordGroups(members, np.array(ends, np.int32), float(questions.sum()))


def _num_branches(questions: Int[np.ndarray, " N"], task: Task) -> np.ndarray:
    """Returns the number of branches of each record in a tree; the expected one if the task draws it."""
    return {"qa": questions, "mixed": (1 + questions) / 2}.get(task, np.ones(len(questions)))


def cached(folder: str, identity: str) -> SameImages | None:
    """Returns the stored result for a data set, or None.

    Args:
      folder: folder of the data set.
      identity: identity of the records; see `store.RecordSource`.
    """
    for path in _cache_paths(folder, identity):
        with contextlib.suppress(OSError, UserError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                return SameImages(arrays["first"], arrays["questions"])
    return None


def store_cache(folder: str, identity: str, same: SameImages) -> None:
    """Stores the result for a data set where `cached` finds it; a full or read-only disk only costs time later."""
    for path in _cache_paths(folder, identity):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, path.parent) as partial, partial.open("wb") as file:
                np.savez_compressed(file, first=same.first, questions=same.questions)
            return
        except (OSError, UserError):
            continue
    _log.warning("%s: its groups of records cannot be stored; the next run computes them again", folder)


def _cache_paths(folder: str, identity: str) -> list[Path]:
    """Returns the places of the file, the best one first."""
    name = f"same_images-{identity[:16]}.npz"
    return [open_location(folder) / name, user_cache_folder() / "groups" / name]
