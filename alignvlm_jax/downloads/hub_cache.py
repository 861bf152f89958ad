"""Finds the files of a model in the cache of the Hugging Face Hub.

    models--org--name/
        refs/main                  name of the revision that the branch points to
        snapshots/REVISION/        the model's files, as links to
        blobs/HASH                 their contents

Users copy the path of any of these folders. Only `snapshots/REVISION` holds the files.
"""

import os
from pathlib import Path

from alignvlm_jax.errors import UserError

_SNAPSHOTS = "snapshots"
_MODEL_PREFIX = "models--"


def snapshot_folder(folder: str | os.PathLike) -> Path:
    """Returns the folder that holds the files of a model, given any folder of it in the cache.

    Every other path is returned unchanged.

    Raises:
      UserError: if the cache holds several revisions or models, so that one has to be named.
    """
    folder = Path(folder)
    root = folder.parent if folder.name == _SNAPSHOTS else folder
    if not (root / _SNAPSHOTS).is_dir():
        models = sorted(path.name for path in folder.glob(f"{_MODEL_PREFIX}*"))
        if models:
            raise UserError(f"{folder} is a cache of the Hub with several models: name one of {', '.join(models[:5])}")
        return folder
    revisions = sorted(path.name for path in (root / _SNAPSHOTS).iterdir() if path.is_dir())
    main = root / "refs" / "main"
    if main.is_file() and (revision := main.read_text(encoding="utf-8").strip()) in revisions:
        return root / _SNAPSHOTS / revision
    if len(revisions) == 1:
        return root / _SNAPSHOTS / revisions[0]
    if not revisions:
        raise UserError(f"{folder} is a model in the cache of the Hub, without any files: download it again")
    raise UserError(
        f"{folder} is a model in the cache of the Hub with {len(revisions)} revisions, and refs/main names none of "
        f"them: name one, such as {root / _SNAPSHOTS / revisions[0]} (the others: {', '.join(revisions[1:5])})"
    )


def model_name(folder: str | os.PathLike) -> str:
    """Returns the name of the model in a folder: "org/name" in the cache of the Hub, elsewhere the folder's name."""
    folder = Path(folder)
    for ancestor in (folder, *folder.parents[:2]):
        if ancestor.name.startswith(_MODEL_PREFIX):
            return ancestor.name.removeprefix(_MODEL_PREFIX).replace("--", "/")
    return folder.name
