"""Parses locations: paths on a disk, and objects in a bucket.

Commands, tools and configs pass every location that a user names through this module before anything is read or
written, for two reasons. A shell expands `~` only at the start of a word, so neither `--workdir=~/run` nor a config has
it expanded. And pathlib turns `gs://bucket/run` into the local folder `gs:/bucket/run`.

    local_path("~/runs/a")        "/home/anna/runs/a"
    local_path("file:///data/a")  "/data/a"
    local_path("gs://bucket/a")   LocationError: it is in a bucket
    location("gs://bucket/a")     "gs://bucket/a"

The functions are also types of argparse: a `LocationError` becomes a message that names the argument.
"""

import argparse
import os
import pathlib
import re
import urllib.parse

from alignvlm_jax.errors import UserError

BUCKETS = ("gs", "s3")

# A scheme has two letters or more, because `C:/` is a drive of Windows.
_URL = re.compile(r"\s*(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/+)(?P<rest>.*)", re.DOTALL)
_KINDS = {
    **dict.fromkeys(("gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "r2", "oss"), "is in a bucket"),
    **dict.fromkeys(("http", "https", "ftp", "ftps"), "is on the web"),
    "hf": "is on the Hugging Face Hub",
    "file": "names another host",
    "hdfs": "is in HDFS",
    "dbfs": "is in DBFS",
}
_NEXT_STEPS = {
    "is in a bucket": "Expected a path on a disk that all hosts see: mount the bucket, or copy it there (only "
    "tools/prepare_data.py takes gs:// and s3://)",
    "is on the web": "Expected a path on a disk; to read it, download it",
    "is on the Hugging Face Hub": "Expected a path on a disk: download it with `hf download`",
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
    """Returns a path as `local_path` does, or the URL of an object in a bucket (`gs://`, `s3://`)."""
    return _parse(os.fspath(text), BUCKETS)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Returns whether a location that was parsed is on a disk."""
    return "://" not in os.fspath(path)


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
            if match["slashes"] != "//" or not match["rest"].partition("/")[0]:
                raise LocationError(f"{text} names no bucket: expected {scheme}://BUCKET/PATH")
            return f"{scheme}://{match['rest']}"
        raise _refusal(text, scheme)
    if "://" in text:
        raise _refusal(text, text.partition("://")[0].rpartition("/")[2])
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and expanded == text:
        user = re.split(r"[/\\]", text)[0]
        raise LocationError(f"{text}: this machine has no user {user[1:]}. Write ./{text} for a file of this name")
    return expanded


def _file_path(match: re.Match[str]) -> str | None:
    """Returns the path of a file:// URL, or None if it names another host."""
    host, path = ("", match["rest"]) if len(match["slashes"]) != 2 else match["rest"].partition("/")[::2]
    return "/" + urllib.parse.unquote(path) if host in ("", "localhost") else None


def _refusal(text: str, scheme: str) -> LocationError:
    kind = _KINDS.get(scheme.lower(), f"has the scheme {scheme}://, which is not supported")
    return LocationError(f"{text} {kind}. {_NEXT_STEPS.get(kind, 'Expected a path on a disk')}")
