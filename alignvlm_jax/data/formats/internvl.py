"""InternVL's meta files: a JSON object that names the records and the images of each data set, and how often to use it.

    {"sharegpt4v": {"root": "playground/data/", "annotation": "opensource/sharegpt4v.jsonl", "repeat_time": 1}}

`annotation` and `root` are relative to the meta file, or to the working directory if there is nothing there. The image
paths of the records start from `root` and stay in it; --images replaces it. A `repeat_time` of 2 uses every record
twice, and one of 0.5 uses the first half of the records, as InternVL itself does.
"""

import dataclasses
import json
import re
from typing import Any

from etils import epath

from alignvlm_jax.data.formats import json_files
from alignvlm_jax.data.formats.conversation import FormatOptions, Slice
from alignvlm_jax.data.paths import open_binary
from alignvlm_jax.errors import UserError

_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"[^"]*"\s*:\s*\{')
_HEAD_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class MetaEntry:
    """One data set of a meta file: its records, the folder of its images, and how often its records are used."""

    file: str
    image_root: str | None
    repeat_time: float


def read_meta(file: str) -> list[MetaEntry] | None:
    """Returns the data sets of a meta file, or None if the file is something else.

    Raises:
      UserError: if an entry is not valid.
    """
    if not epath.Path(file).is_file():
        return None
    with open_binary(file) as stream:
        head = stream.read(_HEAD_BYTES)
        if not _START.match(head) or b'"annotation"' not in head:
            return None
        try:
            content = json.loads(head + stream.read())
        except (ValueError, RecursionError):
            return None
    if not all(isinstance(entry, dict) and "annotation" in entry for entry in content.values()):
        return None
    return [_read_entry(entry, file, name) for name, entry in content.items()]


def plan_entry(entry: MetaEntry, options: FormatOptions) -> list[Slice]:
    """Returns the slices of a data set."""
    picks = None
    if entry.repeat_time < 1:
        picks = list(range(int(json_files.count_records(entry.file) * entry.repeat_time)))
    slices = json_files.plan_file(entry.file, options, picks)
    slices = [dataclasses.replace(piece, image_root=entry.image_root) for piece in slices]
    return slices * max(1, int(entry.repeat_time))


def _read_entry(entry: dict[str, Any], file: str, name: str) -> MetaEntry:
    """Returns one entry of a meta file."""
    where = f"{file}: data set {name!r}"
    annotation, root, repeat = entry["annotation"], entry.get("root"), entry.get("repeat_time", 1)
    if not isinstance(annotation, str) or not isinstance(root, str | None):
        raise UserError(f"{where}: expected paths as 'annotation' and 'root'")
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 < repeat < 1 and repeat != int(repeat):
        raise UserError(f"{where}: repeat_time is {repeat!r}, expected a fraction below 1 or a whole number")
    folder = epath.Path(file).parent
    path = str(folder / annotation) if (folder / annotation).exists() else annotation
    if not epath.Path(path).is_file():
        raise UserError(f"{where}: no such file: {path}")
    roots = [path for path in (folder / root, epath.Path(root)) if path.is_dir()] if root else []
    return MetaEntry(path, str(roots[0]) if roots else None, repeat)
