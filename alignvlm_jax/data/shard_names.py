"""Files that were published as numbered shards, and which of them are missing.

    test-00000-of-00002.parquet                      Hugging Face's `datasets`, since 2023
    test-00000-of-00002-6f3344faa23e9b0a.parquet     before: each shard has a hash of its own
    train.array_record-00000-of-00008                TFDS

A download that ended early leaves some of the shards, and a second download, after the publisher has uploaded other
shards, leaves both sets. Neither shows in a figure, so the names are checked before anything is read.
"""

import dataclasses
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

_SHARD = re.compile(r"(?P<stem>.*?)(?P<index>\d+)-of-(?P<total>\d+)(?P<rest>.*)", re.DOTALL)
# The hash of an upload, and the mark that a browser gives a second download.
_UPLOAD = re.compile(r"^-[0-9a-f]{6,}(?=\.|$)|^ ?\(\d+\)(?=\.|$)")
_SNAPSHOT = re.compile(r"(.*/snapshots/)([0-9a-f]{40})/(.*)", re.DOTALL)
_SHOWN = 4

_Shards = dict[int, list[str]]
"""Maps the number of a shard to its files; there should be one."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The files of complete uploads, and what is wrong with the others.

    Attributes:
      files: files to read, in the given order. Of two uploads in one folder it has only one.
      missing: one sentence for each set of shards that is incomplete or there twice.
    """

    files: tuple[str, ...]
    missing: tuple[str, ...] = ()


def select(files: Iterable[str], exists: Callable[[str], bool] | None = None) -> Selection:
    """Returns the files to read, with a sentence about each incomplete or repeated set of shards.

    Args:
      files: paths with `/`. Names without "-of-" belong to no set, and are always read.
      exists: if given, a shard that is not among the files but exists was left out on purpose, and is not missing.
    """
    files = tuple(files)
    # Folder, beginning and end of the names -> number of shards -> number of the shard -> its files.
    uploads: dict[tuple[str, str, str], dict[int, _Shards]] = defaultdict(dict)
    for file in files:
        folder, name = posixpath.split(file)
        if match := _SHARD.fullmatch(name):
            key = folder, match["stem"], _UPLOAD.sub("", match["rest"])
            shards = uploads[key].setdefault(int(match["total"]), {})
            shards.setdefault(int(match["index"]), []).append(file)
    unread: set[str] = set()
    missing: list[str] = []
    for (folder, *_), totals in uploads.items():
        # A complete set is preferred, and of two complete ones the one with more shards.
        chosen = max(totals, key=lambda total: (not _absent(totals[total], total), total))  # noqa: B023
        for problem, files_of_problem in (
            _other_uploads(totals, chosen),
            _repeated(totals[chosen]),
            (_incomplete(totals[chosen], chosen, exists), ()),
        ):
            unread.update(files_of_problem)
            missing += [f"{folder or '.'}: {problem}"] * bool(problem)
    missing += _snapshots(files)
    return Selection(tuple(file for file in files if file not in unread), tuple(missing))


def _other_uploads(totals: Mapping[int, _Shards], chosen: int) -> tuple[str, list[str]]:
    """Returns a sentence about uploads of different numbers of shards, and the files that are not read."""
    if len(totals) == 1:
        return "", []
    patterns = {total: _pattern(_example(shards)) for total, shards in sorted(totals.items())}
    unread = [file for total in totals if total != chosen for copies in totals[total].values() for file in copies]
    return (
        f"the shards of {len(totals)} uploads are side by side, {' and '.join(patterns.values())}; remove one of them "
        f"(--allow-partial reads only {patterns[chosen]})"
    ), unread


def _repeated(shards: _Shards) -> tuple[str, list[str]]:
    """Returns a sentence about shards with several files, and the files that are not read."""
    repeated = [copies for copies in shards.values() if len(copies) > 1]
    if not repeated:
        return "", []
    names = [posixpath.basename(file) for file in repeated[0]]
    return (
        f"two uploads are side by side, {' and '.join(names)}; remove one of them (--allow-partial reads only "
        f"{names[-1]})"
    ), [file for copies in repeated for file in copies[:-1]]


def _incomplete(shards: _Shards, total: int, exists: Callable[[str], bool] | None) -> str:
    """Returns a sentence about missing shards, or nothing if all are there."""
    absent = [_sibling(_example(shards), index) for index in _absent(shards, total)]
    if exists is not None:
        absent = [file for file in absent if not exists(file)]
    return describe_missing(absent, total) if absent else ""


def describe_missing(absent: Sequence[str], total: int) -> str:
    """Returns a sentence that names missing shards of a set, with `total` shards in all."""
    verb = "is" if len(absent) == 1 else "are"
    return f"{len(absent)} of {total} shards {verb} missing, {_some(map(posixpath.basename, absent))}"


def gaps(files: Sequence[str]) -> list[str]:
    """Returns a sentence for each folder whose files are numbered ("00000.tar", "00002.tar") with numbers left out."""
    numbers: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for file in files:
        folder, name = posixpath.split(file)
        match = re.fullmatch(r"(.*?)(\d+)(\.\D.*)", name)
        if match and not _SHARD.fullmatch(name):
            numbers[folder, match[1], match[3]][int(match[2])] = match[2]
    sentences = []
    for (folder, stem, rest), present in numbers.items():
        # Of files with numbers of another kind, such as dates, most numbers are absent.
        if len(present) < max(present) - min(present) + 1 < 2 * len(present):
            width = len(next(iter(present.values())))
            absent = [number for number in range(min(present), max(present)) if number not in present]
            names = _some(f"{stem}{number:0{width}}{rest}" for number in absent)
            sentences.append(f"{folder or '.'}: the numbered files leave out {names}")
    return sentences


def _absent(shards: Iterable[int], total: int) -> list[int]:
    """Returns the numbers of the absent shards, which count from 0 or from 1."""
    present = set(shards)
    first = 1 if total in present and 0 not in present else 0
    return [index for index in range(first, first + total) if index not in present]


def _example(shards: _Shards) -> str:
    """Returns one of the files."""
    return next(iter(shards.values()))[-1]


def _some(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _sibling(file: str, index: int) -> str:
    """Returns the path of another shard. Its hash is not known, so the name ends as if it had none."""
    folder, name = posixpath.split(file)
    match = _SHARD.fullmatch(name)
    rest = _UPLOAD.sub("", match["rest"])
    return posixpath.join(folder, f"{match['stem']}{index:0{len(match['index'])}}-of-{match['total']}{rest}")


def _pattern(file: str) -> str:
    """Returns the name of a shard with a `*` for its number: "test-*-of-00002.parquet"."""
    match = _SHARD.fullmatch(posixpath.basename(file))
    return f"{match['stem']}*-of-{match['total']}{_UPLOAD.sub('', match['rest'])}"


def _snapshots(files: Iterable[str]) -> list[str]:
    """Returns a sentence if files come from two revisions in the Hub's cache."""
    revisions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file in files:
        if match := _SNAPSHOT.fullmatch(file):
            revisions[match[1], match[3]].add(match[2])
    repeated = {folder: found for (folder, _), found in revisions.items() if len(found) > 1}
    return [
        f"{folder}: two revisions are side by side, {' and '.join(sorted(found))}; give one of these folders"
        for folder, found in repeated.items()
    ]
