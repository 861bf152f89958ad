"""Fetches files of a repository on the Hugging Face Hub into its cache.

    files = list_files(parse_model("org/llama"))          the files of the repository, and its commit
    folder = fetch(files, ["config.json"])                .../snapshots/COMMIT

`huggingface_hub` downloads. It locks each file, so only one of several processes on a host downloads it, and the others
wait. It continues a file whose connection breaks; after a kill, finished files are kept, and the others start again.

Without a network, with HF_HUB_OFFLINE=1, or if the Hub refuses, the cache is used, and a line says so.
"""

import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alignvlm_jax.downloads import hub_cache
from alignvlm_jax.downloads.hub_errors import explain, summarize
from alignvlm_jax.downloads.hub_ids import HubId
from alignvlm_jax.downloads.stubs import format_size
from alignvlm_jax.progress import LineBar

_SHORT_COMMIT = 12


@dataclasses.dataclass(frozen=True)
class RemoteFiles:
    """The files of a repository at one commit.

    Attributes:
      hub_id: the repository, with the revision that was asked for.
      commit: the commit that the revision stands for.
      sizes: size of each file in bytes, by its path; 0 if only the cache is known.
      license: its license by its card; None if unknown.
      reason: why the Hub is not used; None if it answered.
    """

    hub_id: HubId
    commit: str
    sizes: Mapping[str, int]
    license: str | None = None
    reason: str | None = None

    @property
    def pinned(self) -> HubId:
        """The repository at the commit."""
        return self.hub_id.at(self.commit)

    @property
    def title(self) -> str:
        """The repository and the beginning of the commit, for messages."""
        return str(dataclasses.replace(self.hub_id.at(self.commit[:_SHORT_COMMIT]), path=""))


@functools.cache
def list_files(hub_id: HubId) -> RemoteFiles:
    """Returns the files of a repository. Later calls in the same process return the same commit.

    A commit that is in the cache with all its names is not asked for again.

    Raises:
      UserError: if there is no such repository or revision, or it may not be read; `TemporaryError` if the Hub cannot
        be reached and the cache does not have the revision.
    """
    import huggingface_hub  # It takes longer to import than a local folder takes to read.
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    if hub_id.is_pinned and (names := hub_cache.listed_names(hub_id)) is not None:
        return RemoteFiles(hub_id, hub_id.revision, names)
    api = huggingface_hub.HfApi(library_name="alignvlm_jax")
    try:
        info = api.repo_info(
            hub_id.name,
            repo_type=hub_id.kind,
            revision=hub_id.revision,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            files_metadata=True,
        )
    except RevisionNotFoundError as error:
        raise explain(error, hub_id) from error
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if (cached := _cached_files(hub_id, summarize(error))) is None:
            raise explain(error, hub_id) from error
        return cached
    return RemoteFiles(
        hub_id,
        info.sha,
        {file.rfilename: file.size or 0 for file in info.siblings},
        _license(info.card_data),
    )


def fetch(files: RemoteFiles, names: Collection[str], *, is_quiet: bool = False) -> Path:
    """Downloads files that the cache lacks.

    Args:
      files: the repository.
      names: the files to fetch, among `files.sizes`.
      is_quiet: whether to print nothing, as all processes but the first do.

    Returns:
      The folder in the cache that contains them, and perhaps other files of the same commit.

    Raises:
      UserError: if the files may not be read or the cache cannot be written; `TemporaryError` if the Hub cannot be
        reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    folder = snapshot_of(files)
    missing = sorted(name for name in names if not (folder / name).exists())
    if not missing:
        reason = f", because {files.reason}" if files.reason else ""
        say(f"{files.title}: from the cache{reason} ({folder})", is_quiet=is_quiet)
        return folder
    if files.reason:
        raise explain(None, files.hub_id, reason=files.reason, missing=missing)
    size = format_size(sum(files.sizes[name] for name in missing))
    count = f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
    license = f", license {files.license}" if files.license else ""
    say(f"{files.title}: downloading {count}, {size}{license}, to {folder}", is_quiet=is_quiet)
    try:
        huggingface_hub.snapshot_download(
            files.hub_id.name,
            repo_type=files.hub_id.kind,
            revision=files.commit,
            allow_patterns=[_escape(name) for name in missing],
            library_name="alignvlm_jax",
            tqdm_class=_progress_class(is_quiet),
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise explain(error, files.hub_id, missing=missing) from error
    # Without this, the name of the branch would be unknown once there is no network.
    hub_cache.record_revision(files.hub_id, files.commit)
    hub_cache.remove_leftovers(files.hub_id)
    return folder


def snapshot_of(files: RemoteFiles) -> Path:
    """Returns the folder in the cache that is or will be that of the commit."""
    return hub_cache.snapshot_path(files.hub_id, files.commit)


def matches(name: str, pattern: str) -> bool:
    """Returns whether a path matches a pattern whose `*` does not match a slash."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def say(text: str, *, is_quiet: bool = False) -> None:
    """Prints a line on stderr, once per process."""
    if not is_quiet:
        _say_once(text)


def _cached_files(hub_id: HubId, reason: str) -> RemoteFiles | None:
    """Returns the files that the cache has of a revision, or None without any."""
    commit = hub_cache.cached_commit(hub_id)
    if commit is None:
        return None
    names = hub_cache.listed_names(hub_id.at(commit)) or hub_cache.cached_names(hub_id, commit)
    return RemoteFiles(hub_id, commit, names, reason=reason) if names else None


def _license(card: Any) -> str | None:
    """Returns the license of a card; "other" stands for one with a name of its own."""
    card = {} if card is None else card if isinstance(card, dict) else card.to_dict()
    name = card.get("license_name") if card.get("license") in (None, "other") else card.get("license")
    return name if isinstance(name, str) else None


def _escape(name: str) -> str:
    """Returns a pattern that matches only this name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress_class(is_quiet: bool) -> type | None:
    """Returns the class of the progress bars; None for the library's own bars, which need a terminal."""
    if is_quiet:
        return _HiddenBar
    return None if sys.stderr is not None and sys.stderr.isatty() else _ByteLines


class _HiddenBar(LineBar):
    """A bar that is not shown."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"disable": True})


class _ByteLines(LineBar):
    """Lines about the bytes that have arrived; the library's other two bars, of files and of transfers, are hidden."""

    def __init__(self, *args: Any, **options: Any):
        is_hidden = options.get("unit") != "B" or "Downloading bytes" in str(options.get("desc"))
        options.pop("bar_format", None)
        super().__init__(*args, **options | {"desc": "downloading", "disable": is_hidden})

    def set_description(self, *args: Any, **options: Any) -> None:
        """Keeps the description; the library's are about its storage."""

    def __del__(self):
        # The library does not close its bars. tqdm would print a last line when they are collected.
        pass
