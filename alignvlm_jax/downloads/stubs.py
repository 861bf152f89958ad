"""Says what a file is if its content is not what its name promises: a Git LFS pointer, a web page, a broken link.

    describe_stub("llama/tokenizer.json")  # "is a Git LFS pointer, a stub for a file of 9.1 MB: run `git lfs pull`"

The callers put the name of the file in front.
"""

import os
import re
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download it again, for example with `hf download`"
# Beginnings of answers that servers send instead of a file, and that `wget` and `curl` save under its name.
_SERVER_ERRORS = (
    "invalid username or password",
    "entry not found",
    "access to model",
    "access denied",
    "repository not found",
    "not found",
    "unauthorized",
    "forbidden",
    '{"error"',
    "<?xml",
)
# Large enough for the beginning of any of the texts, and for a Git LFS pointer as a whole.
_START = 1024


def describe_stub(path: str | os.PathLike) -> str | None:
    """Returns what a file is instead of what its name promises, and what to do; None if it looks like a real file."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist: copy that file there, or {_AGAIN}"
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError:
        return None
    return describe_stub_content(start)


def describe_stub_content(start: bytes) -> str | None:
    """Returns what a file is, as `describe_stub` does, from its first bytes."""
    if not start:
        return f"is empty: {_AGAIN}"
    if start.startswith(_LFS):
        size = re.search(rb"^size (\d+)", start, re.MULTILINE)
        stands_for = f", a stub for a file of {format_size(int(size[1]))}" if size else ""
        return f"is a Git LFS pointer{stands_for}: run `git lfs pull` in its folder, or {_AGAIN}"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive, such as pickled weights of PyTorch"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, for llama.cpp"
    text = start.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    lower = text.lower()
    if lower.startswith(("<!doctype html", "<html")):
        return f"is a web page (HTML) that was saved under this name: {_AGAIN}"
    if text.startswith("../") and "\n" not in text.strip():
        # Archives and file systems without symbolic links store the target as text.
        return f"is a link that was saved as text, to {text.strip()}: {_AGAIN}"
    if lower.startswith(_SERVER_ERRORS):
        return f"is an error message of a server ({text.splitlines()[0][:80]!r}): {_AGAIN}"
    return None


def format_size(num_bytes: int) -> str:
    """Returns a size in decimal units: "1.5 GB"."""
    size, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
