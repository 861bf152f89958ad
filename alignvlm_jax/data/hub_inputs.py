"""Downloads input that is on the Hugging Face Hub, `hf://datasets/ORGANIZATION/NAME[@REVISION][/PATH]`.

    fetch_input("hf://datasets/org/receipts", (".parquet",), "train")    .../snapshots/COMMIT, in the cache of the Hub

Only the files of the format and the split are downloaded, and for JSON the images next to it. A conversion that resumes
reads the commit that it started with.
"""

import posixpath
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from alignvlm_jax.data import split_files
from alignvlm_jax.downloads import hub
from alignvlm_jax.downloads.hub_ids import HubId, parse_dataset
from alignvlm_jax.errors import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".heic", ".heif", ".avif")
_ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
# Files that contain their images.
_WITH_IMAGES = (".parquet", *_ARCHIVE_ENDINGS)


def fetch_input(text: str, endings: Sequence[str], split: str, *, with_images: bool, commit: str | None) -> str:
    """Downloads the files of an input, and returns its place in the cache: a file, a folder or a pattern.

    Args:
      text: the input.
      endings: endings of the files of the format.
      split: name of the split that is made of them.
      with_images: whether the images that JSON files refer to are in the same repository.
      commit: commit of an earlier run; None uses the revision that the input names.

    Raises:
      UserError: if the data set cannot be read, or has no such files.
    """
    hub_id = parse_dataset(text)
    files = _list(hub_id, commit)
    names = _names_beneath(files.sizes, hub_id.path)
    chosen = [name for name in names if name.lower().endswith(tuple(endings)) and not _describes(name)]
    if hub_id.path not in files.sizes:
        root = f"{hub_id.at(files.commit)}"
        paths, _ = split_files.select([f"{root}/{name}" for name in chosen], root, split)
        chosen = [path.removeprefix(f"{root}/") for path in paths]
    else:
        chosen = [hub_id.path]
    if not chosen:
        raise UserError(
            f"input {text}: no {' or '.join(endings)} files there. {files.title} has {_examples(names or files.sizes)}"
        )
    images = []
    folders = {posixpath.dirname(name) for name in chosen if not name.lower().endswith(_WITH_IMAGES)}
    if with_images and folders:
        images = [name for name in files.sizes if _is_image(name) and any(_is_beneath(name, top) for top in folders)]
        archives = [name for name in files.sizes if name.lower().endswith(_ARCHIVE_ENDINGS)]
        if archives and not images:
            hub.say(f"note: {files.title} has archives ({_examples(archives)}): unpack them, and give them as --images")
    folder = hub.fetch(files, [*chosen, *images])
    return str(folder / hub_id.path)


def fetch_images(text: str, *, commit: str | None) -> str:
    """Downloads all images beneath a folder of a data set, and returns the folder in the cache."""
    hub_id = parse_dataset(text)
    files = _list(hub_id, commit)
    names = [name for name in files.sizes if _is_image(name) and _is_beneath(name, hub_id.path)]
    if not names:
        raise UserError(f"images {text}: no images there. {files.title} has {_examples(files.sizes)}")
    return str(hub.fetch(files, names) / hub_id.path)


def _list(hub_id: HubId, commit: str | None) -> hub.RemoteFiles:
    """Returns the files of the repository, at the commit of an earlier run if the input leaves the revision open."""
    revision = hub_id.revision or commit
    return hub.list_files(HubId(hub_id.name, revision, hub_id.kind))


def _names_beneath(names: Collection[str], path: str) -> list[str]:
    """Returns the files that a path of the repository names: a file, a folder, a pattern, or everything."""
    if path in names:
        return [path]
    if set(path) & set("*?["):
        return [name for name in names if hub.matches(name, path)]
    return [name for name in names if _is_beneath(name, path)]


def _is_beneath(name: str, folder: str) -> bool:
    return folder in ("", ".") or PurePosixPath(name).is_relative_to(folder)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _describes(name: str) -> bool:
    return split_files.describes_data(posixpath.basename(name))


def _examples(names: Collection[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more files" if len(names) > 4 else "")
