"""Finds the files of a model in the cache of the Hugging Face Hub.

    models--org--name/
        refs/main                  name of the revision that the branch points to
        snapshots/REVISION/        the model's files, as links to
        blobs/HASH                 their contents

Users copy the path of any of these folders. Only `snapshots/REVISION` holds the files.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from alignvlm_jax.downloads.hub_ids import SCHEME, HubId, parse_dataset, parse_model
from alignvlm_jax.errors import UserError

_SNAPSHOTS = "snapshots"
_MODEL_PREFIX = "models--"
_DATASET_SNAPSHOT = re.compile(
    r"(?P<cache>.*)/datasets--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?"
)


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
    """Returns "org/name@commit" for a model on the Hub, "org/name" for one in its cache, else the folder's name."""
    if (hub_id := parse_model(os.fspath(folder))) is not None and hub_id.is_pinned:
        return str(hub_id)
    folder = Path(folder)
    for ancestor in (folder, *folder.parents[:2]):
        if ancestor.name.startswith(_MODEL_PREFIX):
            return ancestor.name.removeprefix(_MODEL_PREFIX).replace("--", "/")
    return folder.name


def snapshot_path(hub_id: HubId, commit: str) -> Path:
    """Returns the folder of a commit in the cache, which may not exist."""
    return _storage(hub_id) / _SNAPSHOTS / commit


def cached_commit(hub_id: HubId) -> str | None:
    """Returns the commit that the cache knows for a revision, or None if it does not know it."""
    if hub_id.is_pinned:
        commit = hub_id.revision
    else:
        try:
            commit = (_storage(hub_id) / "refs" / (hub_id.revision or "main")).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    return commit if snapshot_path(hub_id, commit).is_dir() else None


def cached_names(hub_id: HubId, commit: str) -> Mapping[str, int]:
    """Returns the paths of the files that the cache has of a commit, with their sizes."""
    folder = snapshot_path(hub_id, commit)
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.exists()}


def listed_names(hub_id: HubId) -> Mapping[str, int] | None:
    """Returns all files of a commit, with their sizes, if an earlier download stored the list; None otherwise."""
    import huggingface_hub

    # Version 2 of the library stores lists of files.
    read = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if read is None:
        return None
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in read(hub_id.name, repo_type=hub_id.kind, revision=hub_id.revision)}
    except CachedRepoTreeNotFoundError:
        return None


def cache_of(path: str | os.PathLike) -> Path | None:
    """Returns the cache of the Hub that a file or folder of a data set is in; None if it is elsewhere."""
    found = _snapshot_of(os.fspath(path))
    return None if found is None else found[0]


def hub_name(path: str | os.PathLike) -> str | None:
    """Returns the name on the Hub of a data set's file or folder in the cache; None if it is elsewhere."""
    found = _snapshot_of(os.fspath(path))
    return None if found is None else str(found[1])


def commits_of(places: Iterable[str]) -> dict[str, str]:
    """Returns the commits of data sets, by name, whose files are among the places: in the cache, or named by hf://."""
    found = {}
    for place in places:
        snapshot = _snapshot_of(place)
        hub_id = snapshot[1] if snapshot else parse_dataset(place) if place.startswith(SCHEME) else None
        if hub_id is not None and hub_id.is_pinned:
            found[hub_id.name] = hub_id.revision
    return found


def _snapshot_of(path: str) -> tuple[Path, HubId] | None:
    """Returns the cache that a path of a data set is in, and its name on the Hub."""
    match = _DATASET_SNAPSHOT.fullmatch(Path(path).as_posix())
    if match is None:
        return None
    name = match["name"].replace("--", "/", 1)
    return Path(match["cache"]), HubId(name, match["commit"], "dataset", match["path"] or "")


def record_revision(hub_id: HubId, commit: str) -> None:
    """Records the commit that a branch or a tag stands for, as `huggingface_hub` does, if the cache can be written."""
    if hub_id.is_pinned:
        return
    path = _storage(hub_id) / "refs" / (hub_id.revision or "main")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(commit, encoding="utf-8")
        partial.replace(path)


def remove_leftovers(hub_id: HubId) -> None:
    """Deletes what killed processes left of files that have been downloaded since."""
    for path in (_storage(hub_id) / "blobs").glob("*.incomplete"):
        if path.with_name(path.name.partition(".")[0]).exists():
            with contextlib.suppress(OSError):
                path.unlink()


def _storage(hub_id: HubId) -> Path:
    """Returns the folder of a repository in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{hub_id.kind}s--{hub_id.name.replace('/', '--')}"
