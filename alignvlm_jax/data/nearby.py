"""Says what is at or near a path where something else was expected, for messages about wrong paths."""

import collections
import itertools
import os
from collections.abc import Iterator

from etils import epath

from alignvlm_jax.data.shards import INFO_FILE
from alignvlm_jax.locations import is_local

_PLAN = "progress/plan.json"
_MAX_NAMES = 8
_MAX_DEPTH = 5
_MAX_FOLDERS = 2000
_RAW_ENDINGS = (".json", ".jsonl", ".parquet", ".tar", ".tgz", ".arrow")


def describe_no_dataset(folder: str | os.PathLike) -> str:
    """Returns why a folder is not a data set, and which data sets are beneath it, or else near it."""
    path = epath.Path(folder)
    if path.is_file():
        return f"{folder} is not a data set but a file"
    why = "it holds no dataset_info.json" if path.exists() else "there is no such folder"
    if (path / _PLAN).exists():
        return f"{folder} is not a data set yet: run the same `alignvlm prepare` command again to finish it"
    if not is_local(folder):
        return f"{folder} is not a data set: {why}"  # a bucket takes long to search
    beneath = _datasets_beneath(path)
    if not beneath and path.is_dir():
        endings = count_endings(folder)
        if raw := [ending for ending in _RAW_ENDINGS if ending in endings]:
            why += f"; `alignvlm prepare` makes one of its {' and '.join(raw)} files"
    # If there are none beneath the folder, look beneath the nearest folder that exists above it.
    above = next((parent for parent in path.parents if parent.exists() and str(parent) != "/"), None)
    base = path if beneath or above is None else above
    if beneath := beneath or _datasets_beneath(base):
        return f"{folder} is not a data set: {why}. Data sets beneath {base}: {_join(beneath)}"
    return f"{folder} is not a data set: {why}"


def count_endings(folder: str | os.PathLike) -> dict[str, int]:
    """Returns how many files beneath a folder have each ending, the most frequent first."""
    endings = collections.Counter()
    for parent, _, files in itertools.islice(_walk(epath.Path(folder)), _MAX_FOLDERS):
        endings.update(os.path.splitext(name)[1].lower() or parent.joinpath(name).name for name in files)
    return dict(endings.most_common())


def list_names(folder: str | os.PathLike) -> str:
    """Returns the names in a folder, or the first of them."""
    return _join(sorted(path.name for path in itertools.islice(epath.Path(folder).iterdir(), 1000))) or "nothing"


def _datasets_beneath(folder: epath.Path) -> list[str]:
    """Returns the data sets beneath a folder, as paths relative to it."""
    found = []
    for parent, _, files in itertools.islice(_walk(folder), _MAX_FOLDERS):
        if INFO_FILE in files and parent != folder:
            found.append(str(parent)[len(str(folder)) :].lstrip("/") if str(folder) != "." else str(parent))
    return sorted(found)


def _walk(folder: epath.Path, depth: int = 0) -> Iterator[tuple[epath.Path, list[epath.Path], list[str]]]:
    """Yields each folder down to a depth, its folders, and the names of its files; follows links only at the top."""
    folders, files = [], []
    try:
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if is_local(path) and os.path.islink(path) and depth:
                continue
            (folders.append(path) if path.is_dir() else files.append(path.name))
    except OSError:
        return
    yield folder, folders, files
    if depth < _MAX_DEPTH:
        for path in sorted(folders):
            yield from _walk(path, depth + 1)


def _join(names: list[str]) -> str:
    """Returns a list of names in words, cut if it is long."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
