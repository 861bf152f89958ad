"""WebDataset archives of images and captions, such as CC-12M as written by img2dataset, read without unpacking them.

    00000.tar: 000000001.jpg  000000001.txt  000000001.json  000000002.jpg ...

Consecutive files whose names are equal up to the first dot form a sample: its images, and its caption in a `.txt` file
or under "caption" in a `.json` file. An archive is one slice and may be compressed with gzip. The user's message is the
image and `FormatOptions.instruction`, by default empty, as in LLaVA's pre-training. The caption is the answer.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from alignvlm_jax.data.formats.conversation import (
    IMAGE,
    Conversation,
    FormatOptions,
    Refusal,
    Refused,
    Slice,
    expect_object,
    expect_text,
    text_part,
)
from alignvlm_jax.data.paths import open_binary

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXTS = ("txt", "caption")
_USED_ENDINGS = (*_IMAGES, *_TEXTS, "json")
# WebDataset's rule. Files that do not match it (hidden files) belong to no sample.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclasses.dataclass
class _Sample:
    """The files of one sample, by file name extension; `problem` is the reason if it cannot be used."""

    key: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problem: Refusal | None = None


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns one slice per archive. The number of samples is known only after reading."""
    return [Slice(file) for file in files]


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the captioned images of an archive. If it is damaged, the rest of it is one refused record."""
    # The folder of an archive names the data set.
    source = options.source or posixpath.basename(posixpath.dirname(os.path.abspath(piece.file)))
    try:
        for sample in _samples(piece.file, options.max_record_bytes):
            where, record_id = (
                f"{piece.file}: {sample.key}",
                f"{posixpath.basename(piece.file).split('.')[0]}/{sample.key}",
            )
            try:
                if sample.problem is not None:
                    raise sample.problem
                yield _conversation(sample, where, record_id, source, options.instruction)
            except Refusal as refusal:
                yield Refused(where, record_id, refusal.kind, str(refusal))
    except _DamagedArchive as damage:
        yield Refused(f"{piece.file}: byte {damage.offset}", "", "damaged file", str(damage))


class _DamagedArchive(Exception):
    """The rest of the archive cannot be read."""

    def __init__(self, offset: int, why: str):
        super().__init__(f"the archive cannot be read from here on: {why}")
        self.offset = offset


def _conversation(sample: _Sample, where: str, record_id: str, source: str, instruction: str) -> Conversation:
    """Returns the conversation of a sample."""
    images = [data for ending, data in sample.files.items() if ending in _IMAGES]
    if not images:
        raise Refusal("missing image", f"the sample has no image, only {', '.join(sample.files) or 'links'}")
    question = [IMAGE] * len(images) + ([text_part(instruction)] if instruction else [])
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [text_part(_caption(sample.files))]},
    ]
    return Conversation(where, record_id, source, messages, images)


def _caption(files: dict[str, bytes]) -> str:
    """Returns the caption of a sample."""
    try:
        for ending in _TEXTS:
            if ending in files:
                return files[ending].decode("utf-8").strip()
        if "json" in files:
            values = expect_object(json.loads(files["json"].decode("utf-8")), "the sample's .json")
            return expect_text(values.get("caption"), "the caption").strip()
    except UnicodeDecodeError as error:
        raise Refusal("text encoding", f"the caption is not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise Refusal("unreadable record", f"the sample's .json is not valid JSON: {error}") from error
    raise Refusal("empty conversation", "the sample has no caption, neither in a .txt file nor in a .json file")


def _samples(path: str, max_bytes: int) -> Iterator[_Sample]:
    """Yields the samples of an archive. A sample that damage cuts off has a `problem`."""
    sample = None
    try:
        for name, size, data in _members(path, max_bytes):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            key, ending = match[1], match[2].lower()
            # Another key begins the next sample.
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            # Collect the files of the sample; it is refused if one of them cannot be used.
            if ending not in _USED_ENDINGS:
                continue
            if ending in sample.files:
                sample.problem = Refusal("unreadable record", f"the sample has two files {name}")
            elif size > max_bytes:
                sample.problem = Refusal("too large", f"{name} has {size} bytes, more than the limit of {max_bytes}")
            elif data is not None:
                sample.files[ending] = data
    except _DamagedArchive as damage:
        # Yield the sample that the damage cuts off, then let `read` report the damage.
        if sample is not None:
            sample.problem = Refusal("damaged file", f"{damage}; the sample may be incomplete")
            yield sample
        raise
    if sample is not None:
        yield sample


def _members(path: str, max_bytes: int) -> Iterator[tuple[str, int, bytes | None]]:
    """Yields name, size and content of each file; links, devices and files that are too large have no content."""
    with _open_archive(path) as file:
        offset = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    offset = member.offset
                    # Files are read in place and never unpacked to disk. Files that are too large are not read at all.
                    data = archive.extractfile(member).read() if member.isfile() and member.size <= max_bytes else None
                    if not member.isdir():
                        yield member.name, member.size, data
                offset = archive.offset
            _check_end(file, offset)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise _DamagedArchive(offset, str(error)) from error


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raises `_DamagedArchive` unless the archive ends properly, with a block of zeros and nothing after it."""
    # tarfile mistakes a damaged header for the end of the archive, so check for the block of zeros.
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _DamagedArchive(offset, "it is truncated, the end-of-archive mark is missing")
    while block:
        if block.strip(b"\0"):
            raise _DamagedArchive(offset, "expected a file or the end of the archive here")
        block = file.read(2**20)


@contextlib.contextmanager
def _open_archive(path: str) -> Iterator[BinaryIO]:
    """Opens an archive, decompressing gzip."""
    with open_binary(path) as file:
        # Detect gzip by its magic number, because the file name need not say so.
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.open(file) if compressed else contextlib.nullcontext(file) as unpacked:
            yield unpacked
