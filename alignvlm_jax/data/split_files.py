"""Selects the files of one split in a folder that has several, as repositories on the Hub do.

data/train-00000-of-00002.parquet  data/train-00001-of-00002.parquet  data/test-00000-of-00001.parquet
train.jsonl  validation.jsonl
train/0000.tar  val/0000.tar
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence

from alignvlm_jax.errors import UserError

# Files without records that `datasets` and LLaMA-Factory keep next to the data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing", "heldout"), "test"),
}


def describes_data(name: str) -> bool:
    """Returns whether a file in a folder of data is known to hold no records: it is hidden, or describes the others."""
    return name.startswith(".") or name in _DESCRIPTIONS


def select(files: Sequence[str], folder: str, split: str) -> tuple[list[str], str]:
    """Returns the files of a split, and a sentence about those of other splits that are not read.

    Args:
      files: files beneath the folder.
      folder: the folder.
      split: name of the split that is made of them.

    Raises:
      UserError: if the folder has several splits, but not this one.
    """
    by_split = defaultdict(list)
    for file in files:
        by_split[_split_of(file[len(folder) :].lstrip("/"))].append(file)
    named = {name: found for name, found in by_split.items() if name}
    if len(named) < 2:
        return list(files), ""
    wanted = _SPLITS.get(split, split)
    if wanted not in named:
        raise UserError(
            f"input {folder} has files of the splits {' and '.join(sorted(named))}, but not of {split} (--split). Give "
            "the files to convert, such as --input 'FOLDER/train*'"
        )
    # Files without the name of a split may be either; nothing tells that they are of another one.
    chosen = set(named[wanted]) | set(by_split[""])
    others = ", ".join(f"{name} ({len(found)} files)" for name, found in sorted(named.items()) if name != wanted)
    return [file for file in files if file in chosen], (
        f"{folder}: only files of the split {wanted} are read (--split), not those of {others}"
    )


def _split_of(path: str) -> str:
    """Returns the split that a relative path names, or an empty text."""
    *folders, name = path.split("/")
    folders = [folder.removeprefix("partial-") for folder in folders]
    words = [re.split(r"[-_.\d]", name, maxsplit=1)[0], *reversed(folders), posixpath.splitext(name)[0].split("_")[-1]]
    return next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), "")
