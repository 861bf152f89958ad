"""Finds input files that are there twice, and signs that a folder of data is not all there.

train.json  "train (1).json"     a browser's second download of the same file
data.jsonl.incomplete            an interrupted download
default/partial-train/0000.parquet   the Hub's conversion of only the first gigabytes of a split
"""

import os
import re
from collections.abc import Iterator, Sequence

from alignvlm_jax.locations import is_local

_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
_COPY = re.compile(r"(.*?)(?: \(\d+\)| copy(?: \d+)?| - Copy)(\.[^/]+)")
_PARTIAL = re.compile(r"partial-(?:train|validation|val|dev|test)")
_SHOWN = 4


def distinct(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the files without those that were given before, and a sentence about those."""
    seen, kept, repeated = set(), [], []
    for file in files:
        place = os.path.realpath(file) if is_local(file) else file
        (repeated if place in seen else kept).append(file)
        seen.add(place)
    names = ", ".join(dict.fromkeys(repeated[:_SHOWN]))
    return kept, [f"{len(repeated)} files were given twice and are read once: {names}"] if repeated else []


def copies(files: Sequence[str]) -> Iterator[str]:
    """Yields a sentence about each file that seems to be a copy of another, by its name and its size."""
    present = {file for file in files if is_local(file)}
    for file in sorted(present):
        match = _COPY.fullmatch(file)
        original = match and match[1] + match[2]
        if original in present and os.path.getsize(original) == os.path.getsize(file):
            yield f"{file} seems to be a copy of {os.path.basename(original)}; remove it"


def unfinished(folder: str) -> Iterator[str]:
    """Yields a sentence about interrupted downloads and partial conversions beneath a local folder."""
    if not is_local(folder):
        return
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(_UNFINISHED)]
        for name in folders:
            if _PARTIAL.fullmatch(name):
                yield f"{os.path.join(parent, name)} holds only the first part of a split, as the Hub converted it"
    if found:
        yield f"downloads were interrupted, {', '.join(sorted(found)[:_SHOWN])}; repeat them"
