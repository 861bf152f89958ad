"""Says what a file of records is, from its first bytes, if it is not what was expected: a pointer, an archive, a page.

`file_kinds.py` does the same for files that should be images.
"""

import re
from collections.abc import Mapping

from alignvlm_jax.data.file_kinds import identify, is_office

HEAD_BYTES = 512

# How `alignvlm prepare` reads the content of a file. Benchmarks have no such choice.
FORMATS_OF: Mapping[str, str] = {
    "json": "read it with --format messages, llava or docdownstream",
    "tar": "read it with --format webdataset",
    "parquet": "read it with --format messages or bigdocs",
}

_HTML = re.compile(rb"\s*(?:<!doctype html|<html|<head)", re.IGNORECASE)
_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]")
# Each kind: whether the first bytes are of this kind, and what a file of the kind is.
_KINDS = {
    "json": (_JSON.match, "JSON text"),
    "tar": (lambda head: head[257:262] == b"ustar", "a tar archive; unpack it"),
    "parquet": (lambda head: head[:4] == b"PAR1", "a Parquet file"),
    "gzip": (lambda head: head[:2] == b"\x1f\x8b", "compressed with gzip; unpack it with `gunzip`"),
    "office": (
        lambda head: head[:4] == b"PK\3\4" and is_office(head),
        "an Excel sheet or another office document; store its table as JSON lines, one object per row",
    ),
    "zip": (lambda head: head[:4] in (b"PK\3\4", b"PK\5\6"), "a zip archive; unpack it and give the files in it"),
    "zstd": (lambda head: head[:4] == b"(\xb5/\xfd", "compressed with zstd; unpack it with `unzstd`"),
    "arrow": (
        lambda head: head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")),
        "an Arrow file, as `save_to_disk` writes it; store the data set with `to_parquet` and read that",
    ),
    "lfs": (
        lambda head: head.startswith(b"version https://git-lfs.github.com/spec/"),
        "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    ),
    "html": (_HTML.match, "a web page, perhaps the error page of a download; download the file again"),
    "utf-16": (
        lambda head: head.startswith((b"\xff\xfe", b"\xfe\xff")),
        "text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    ),
    "image": (
        lambda head: head.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")),
        "an image; give a file of records that names it",
    ),
}


def describe_other_content(head: bytes, *expected: str, advice: Mapping[str, str] = FORMATS_OF) -> str | None:
    """Returns what a file is and what to do about it, or None if it may be what was expected.

    Args:
      head: the first `HEAD_BYTES` bytes of the file.
      *expected: kinds of content that are no surprise: "json", "tar", "gzip" or "parquet".
      advice: what to do about a kind of content that the command reads in another way.
    """
    if any(_KINDS[kind][0](head) for kind in expected):
        return None
    for kind, (matches, what) in _KINDS.items():
        if matches(head):
            return f"{what}; {advice[kind]}" if kind in advice else what
    # An archive may begin with the name of its first file, which is any text.
    kind = None if "tar" in expected else identify(head)
    return kind and f"{kind[0]}. {kind[1]}".rstrip(".")
