"""Parses locations: paths on a disk, and objects in a bucket.

Commands, tools and configs pass every location that a user names through this module before anything is read or
written, for two reasons. A shell expands `~` only at the start of a word, so neither `--workdir=~/run` nor a config has
it expanded. And pathlib turns `gs://bucket/run` into the local folder `gs:/bucket/run`.

    local_path("~/runs/a")        "/home/anna/runs/a"
    local_path("file:///data/a")  "/data/a"
    local_path("gs://bucket/a")   LocationError: it is in a bucket
    location("gs://bucket/a")     "gs://bucket/a"
    open_location("gs://bucket")  a path with the interface of pathlib, also for a local path

The functions are also types of argparse: a `LocationError` becomes a message that names the argument.

Buckets have objects, and no folders, renames or appends. A path in a bucket therefore differs from a local one:

- A folder exists while an object is in it. `mkdir` does nothing.
- `rename` copies. Nothing may rely on it: write the object that makes the others count last.
- An object appears when the file is closed. A file opened with "a" replaces the object on GCS.
- `rglob`, `absolute`, `resolve` and `stat().st_size` are not available: see `absolute` here, and `storage/`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import re
import typing
import urllib.parse
from collections.abc import Mapping

from alignvlm_jax.errors import UserError

if typing.TYPE_CHECKING:
    from etils import epath

BUCKETS = {"gs": "gcs", "s3": "s3"}
"""Schemes of buckets, with the extra of this package that each needs."""
_PACKAGES = {"gs": ("gcsfs", "google.cloud.storage"), "s3": ("s3fs",)}
# The rules of both stores, without those that differ.
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")

# A scheme has two letters or more, because `C:/` is a drive of Windows.
_URL = re.compile(r"\s*(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+)(?P<rest>.*)", re.DOTALL)
# Pages of the Hub are refused later, with the name of what they show.
_HUB_PAGES = ("hf://", "https://huggingface.co/", "https://hf.co/")
_KINDS = {
    **dict.fromkeys(("gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "r2", "oss"), "is in a bucket"),
    **dict.fromkeys(("http", "https", "ftp", "ftps"), "is on the web"),
    "hf": "is on the Hugging Face Hub",
    "file": "names another host",
    "hdfs": "is in HDFS",
    "dbfs": "is in DBFS",
}
_NEXT_STEPS = {
    "is in a bucket": "Expected a path on a disk that all hosts see: mount the bucket, or copy it there",
    "is on the web": "Expected a path on a disk; to read it, download it",
    "is on the Hugging Face Hub": "Expected a path on a disk: download it with `hf download` (models and the input of "
    "`prepare` are read from the Hub)",
    "names another host": "Write file:///PATH, or the path alone",
}


class LocationError(UserError, argparse.ArgumentTypeError):
    """A location that cannot be used."""


def local_path(text: str | os.PathLike[str]) -> str:
    """Returns a path on a disk, with `~` and `~user` expanded and `file://` removed.

    Raises:
      LocationError: if the location is empty, has another scheme, or names an unknown user.
    """
    return _parse(os.fspath(text), ())


def as_path(text: str) -> pathlib.Path:
    """Returns `local_path` as a `Path`."""
    return pathlib.Path(local_path(text))


def location(text: str | os.PathLike[str]) -> str:
    """Returns a path as `local_path` does, or the URL of an object in a bucket (`gs://`, `s3://`).

    Raises:
      LocationError: as `local_path`; or if the URL is malformed, or the package that reaches the bucket is missing.
    """
    parsed = parse_location(text)
    if is_bucket(parsed):
        _check_extra(parsed)
        _configure_clients()
    return parsed


def model_location(text: str | os.PathLike[str]) -> str:
    """Returns a location as `parse_location` does, or the name of a model on the Hugging Face Hub (`hf://`).

    `downloads/sources.py` decides whether ORGANIZATION/NAME without a scheme is a folder or on the Hub.
    """
    text = os.fspath(text)
    return text if text.startswith(_HUB_PAGES) else parse_location(text)


def source_location(text: str | os.PathLike[str]) -> str:
    """Returns a location as `location` does, or a model or data set on the Hugging Face Hub (`hf://`)."""
    text = os.fspath(text)
    return text if text.startswith(_HUB_PAGES) else location(text)


def parse_location(text: str | os.PathLike[str]) -> str:
    """Returns the same as `location`, also without the package that reaches the bucket."""
    return _parse(os.fspath(text), tuple(BUCKETS))


def open_location(text: str | os.PathLike[str]) -> epath.Path:
    """Returns the path of a location: a `pathlib.Path` on a disk, an `epath.Path` with the same interface in a bucket.

    Raises:
      LocationError: as `location`.
    """
    parsed = location(text)
    if is_local(parsed):
        return pathlib.Path(parsed)
    from etils import epath  # takes 0.4 s, which only buckets need

    return epath.Path(parsed)


def join(root: str | os.PathLike[str], name: str) -> epath.Path:
    """Returns the path of a location that is relative to a folder, or in another place: `root / name` of a path."""
    return open_location(name) if is_bucket(name) else open_location(root) / name


def user_cache_folder(environ: Mapping[str, str] = os.environ) -> pathlib.Path:
    """Returns the folder of this package in the user's cache, after the XDG base directory specification."""
    root = pathlib.Path(environ.get("XDG_CACHE_HOME") or "")
    # The specification says to ignore relative paths.
    return (root if root.is_absolute() else pathlib.Path(os.path.expanduser("~/.cache"))) / "alignvlm"


def absolute(path: epath.Path | pathlib.Path) -> epath.Path:
    """Returns the absolute form of a path that was opened."""
    return path if is_bucket(path) else path.absolute()


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a location that was parsed or opened is in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKETS))


def is_local(path: str | os.PathLike[str]) -> bool:
    """Returns whether a location that was parsed or opened is on a disk."""
    return "://" not in os.fspath(path)


@functools.cache
def _configure_clients() -> None:
    """Sets the defaults of the libraries that reach buckets. The user's own settings have precedence."""
    # epath would reach buckets through TensorFlow wherever it is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # The plain protocol serves every type of bucket but the zonal one, and needs no second connection.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config

    for name in ("gcs", "s3"):
        # Other hosts write to the same bucket, so a list of objects is asked for every time.
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def _check_extra(url: str) -> None:
    scheme = url.partition(":")[0]
    for package in _PACKAGES[scheme]:
        try:
            is_installed = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # of a parent, such as google.cloud
            is_installed = False
        if not is_installed:
            raise LocationError(
                f'{url} is in a bucket, which needs one more package: pip install "alignvlm-jax[{BUCKETS[scheme]}]". '
                "Or give a path on a disk"
            )


def _parse(text: str, schemes: tuple[str, ...]) -> str:
    if not text.strip():
        raise LocationError("the path is empty: expected a file or folder")
    match = _URL.fullmatch(text)
    scheme = match["scheme"].lower() if match else ""
    # "gs:/bucket" is what pathlib makes of "gs://bucket". With one slash, unknown schemes are names of local folders.
    if match and (len(match["slashes"]) > 1 or scheme in _KINDS):
        if scheme == "file" and (path := _file_path(match)):
            return path
        if scheme in schemes:
            return _bucket_url(text, scheme, match)
        raise _refusal(text, scheme)
    if "://" in text:
        raise _refusal(text, text.partition("://")[0].rpartition("/")[2])
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and expanded == text:
        user = re.split(r"[/\\]", text)[0]
        raise LocationError(f"{text}: this machine has no user {user[1:]}. Write ./{text} for a file of this name")
    return expanded


def _bucket_url(text: str, scheme: str, match: re.Match[str]) -> str:
    """Returns the URL of an object, without a slash at its end."""
    bucket, _, key = match["rest"].rstrip("/").partition("/")
    if match["slashes"] != "//" or not bucket:
        raise LocationError(f"{text} names no bucket: expected {scheme}://BUCKET/PATH")
    if not _BUCKET_NAME.fullmatch(bucket):
        raise LocationError(
            f"{text}: {bucket!r} cannot be the name of a bucket (3 or more of a-z, 0-9, '-', '_' and '.'): expected "
            f"{scheme}://BUCKET/PATH"
        )
    # Objects with such names exist, but libraries disagree on their paths.
    if key and not {"", ".", ".."}.isdisjoint(key.split("/")) or not key.isprintable():
        raise LocationError(f"{text}: write the path without empty parts, '.', '..' and control characters")
    return f"{scheme}://{bucket}/{key}".rstrip("/")


def _file_path(match: re.Match[str]) -> str | None:
    """Returns the path of a file:// URL, or None if it names another host."""
    host, path = ("", match["rest"]) if len(match["slashes"]) != 2 else match["rest"].partition("/")[::2]
    return "/" + urllib.parse.unquote(path) if host in ("", "localhost") else None


def _refusal(text: str, scheme: str) -> LocationError:
    kind = _KINDS.get(scheme.lower(), f"has the scheme {scheme}://, which is not supported")
    return LocationError(f"{text} {kind}. {_NEXT_STEPS.get(kind, 'Expected a path on a disk')}")
