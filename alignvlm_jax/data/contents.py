"""Says what a file is, from its first bytes, when it is not what was expected: a pointer, an archive, an error page."""

import re
from collections.abc import Sequence

HEAD_BYTES = 512

_HTML = re.compile(rb"\s*(?:<!doctype html|<html|<\?xml[^>]*>\s*<(?:!doctype )?html|<head)", re.IGNORECASE)
_KINDS = (
    ("LFS pointer", lambda head: head.startswith(b"version https://git-lfs.github.com/spec/")),
    ("HTML page", _HTML.match),
    ("zip archive", lambda head: head.startswith((b"PK\x03\x04", b"PK\x05\x06"))),
    ("gzip file", lambda head: head.startswith(b"\x1f\x8b")),
    ("7z archive", lambda head: head.startswith(b"7z\xbc\xaf\x27\x1c")),
    ("RAR archive", lambda head: head.startswith(b"Rar!\x1a\x07")),
    ("zstd file", lambda head: head.startswith(b"\x28\xb5\x2f\xfd")),
    ("tar archive", lambda head: head[257:262] == b"ustar"),
    ("Parquet file", lambda head: head.startswith(b"PAR1")),
    ("Arrow file", lambda head: head.startswith((b"ARROW1", b"\xff\xff\xff\xff"))),
    ("PDF", lambda head: head.startswith(b"%PDF-")),
    ("video", lambda head: head[4:8] == b"ftyp" and head[8:11] in (b"iso", b"mp4", b"avc", b"M4V", b"qt ")),
    ("UTF-16 text", lambda head: head.startswith((b"\xff\xfe", b"\xfe\xff"))),
)
_ADVICE = {
    "LFS pointer": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    "HTML page": "a web page, perhaps the error page of a download; download the file again",
    "zip archive": "a zip archive; unpack it and give the files in it",
    "gzip file": "compressed with gzip; unpack it with `gunzip`",
    "7z archive": "a 7z archive; unpack it and give the files in it",
    "RAR archive": "a RAR archive; unpack it and give the files in it",
    "zstd file": "compressed with zstd; unpack it with `unzstd`",
    "tar archive": "a tar archive; read it with --format webdataset, or unpack it",
    "Parquet file": "a Parquet file; read it with --format messages or bigdocs",
    "Arrow file": "an Arrow file, as `save_to_disk` writes it; store the data set with `to_parquet` and read that",
    "PDF": "a PDF; convert its pages to images first",
    "video": "a video; only images are supported",
    "UTF-16 text": "text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
}


def describe_other_content(head: bytes, expected: Sequence[str] = ()) -> str | None:
    """Returns what a file is and what to do about it, or None if it may be what was expected.

    Args:
      head: the first `HEAD_BYTES` bytes of the file.
      expected: kinds that are no surprise, such as "tar archive".
    """
    for kind, matches in _KINDS:
        if kind not in expected and matches(head):
            return _ADVICE[kind]
    return None
