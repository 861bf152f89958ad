"""WebDataset archives of images and texts, such as CC-12M as written by img2dataset, read without unpacking them.

    00000.tar: 000000001.jpg  000000001.txt  000000001.json  000000002.left.JPG  000000002.right.JPG  000000002.txt ...

Consecutive files whose names are equal up to the first dot after the last slash form a sample. The rest of the name is
the ending. The answer is the text of a `.txt` file, "caption" in a `.json` file, or a label in a `.cls` file. The
user's message is the images and `FormatOptions.instruction`, by default empty, as in LLaVA's pre-training. A `.json`
file may also hold a whole conversation (`layouts.py`). An archive is one slice and may be compressed with gzip.

The images of a sample are the files with a plain or numbered ending (`jpg`, `1.jpg`, `page_2.png`). If there are none,
they are the images with any other ending (`left.jpg`), so a mask `seg.png` next to a `jpg` is not used. Where each
image has a text of its own (`1.jpg`, `1.txt`, `2.jpg`, `2.txt`), each pair is a sample.
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
from typing import Any, BinaryIO

from alignvlm_jax.data.contents import HEAD_BYTES, describe_other_content
from alignvlm_jax.data.formats import fields, layouts
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
_IMAGES += ("jfif", "jpe", "jp2", "j2k", "avif", "heic", "heif", "jxl", "ppm", "pgm", "pbm")
_TEXTS = ("txt", "caption")
_ANSWERS = (*_TEXTS, "json", "cls")
_USED_ENDINGS = (*_IMAGES, *_ANSWERS)
_NUMBERED = re.compile(r"(?:(?:img|image|page|frame|view|p)[-_]?)?\d+\.[a-z]+")
_OTHER_MEDIA = {"mp4": "a video", "webm": "a video", "avi": "a video", "mov": "a video", "mkv": "a video"}
_OTHER_MEDIA |= {"wav": "audio", "mp3": "audio", "flac": "audio", "ogg": "audio"}
# WebDataset's rule. Files that do not match it (hidden files) belong to no sample.
_NAME = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclasses.dataclass
class _Sample:
    """The files of one sample.

    Attributes:
      key: name up to its first dot.
      files: the files that are used, by their ending in lower case.
      problem: reason if the sample cannot be used.
      unused: endings of the other files.
    """

    key: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problem: Refusal | None = None
    unused: list[str] = dataclasses.field(default_factory=list)


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns one slice per archive. The number of samples is known only after reading."""
    return [Slice(file) for file in files]


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the captioned images of an archive. If it is damaged, the rest of it is one refused record."""
    # The folder of an archive names the data set.
    source = options.source or posixpath.basename(posixpath.dirname(os.path.abspath(piece.file)))
    shard = posixpath.basename(piece.file).split(".")[0]
    incomplete = set()
    try:
        for sample in _samples(piece.file, options.max_record_bytes):
            for part in _split(sample):
                where, record_id = f"{piece.file}: {part.key}", f"{shard}/{part.key}"
                try:
                    if part.problem is not None:
                        raise part.problem
                    yield _conversation(part, where, record_id, source, options)
                except Refusal as refusal:
                    why = str(refusal)
                    if part.key in incomplete:
                        why += "; its other files are elsewhere in the archive: write it with `tar --sort=name`"
                    if refusal.kind in ("missing image", "empty conversation"):
                        incomplete.add(part.key)
                    yield Refused(where, record_id, refusal.kind, why)
    except _DamagedArchive as damage:
        yield Refused(f"{piece.file}: byte {damage.offset}", "", "damaged file", str(damage))


class _DamagedArchive(Exception):
    """The rest of the archive cannot be read."""

    def __init__(self, offset: int, why: str):
        super().__init__(f"the archive cannot be read from here on: {why}")
        self.offset = offset


def _split(sample: _Sample) -> list[_Sample]:
    """Returns the sample, or if each of its images has a text of its own, a sample for each image."""
    stems = {ending.rpartition(".")[0] for ending in sample.files if _kind(ending) in _ANSWERS}
    if sample.problem is not None or len(stems) < 2 or "" in stems:
        return [sample]
    parts = {}
    for ending, data in sample.files.items():
        stem, _, kind = ending.rpartition(".")
        parts.setdefault(stem, {})[kind] = data
    if parts.keys() == stems and all(any(kind in _IMAGES for kind in files) for files in parts.values()):
        return [_Sample(f"{sample.key}.{stem}", files) for stem, files in parts.items()]
    why = (
        f"the sample has several texts ({', '.join(sorted(stems)[:4])}) that do not belong to one image each. The "
        "names of different samples must differ before their first dot"
    )
    return [dataclasses.replace(sample, problem=Refusal("unreadable record", why))]


def _conversation(sample: _Sample, where: str, record_id: str, source: str, options: FormatOptions) -> Conversation:
    """Returns the conversation of a sample."""
    endings = _image_endings(sample.files)
    values = _json(sample.files)
    images = [sample.files[ending] for ending in endings]
    if layouts.has_conversation(values):
        images = _named_images(values, sample, endings) or images
        # Without image files, the conversation has no images, or holds them itself.
        return layouts.to_conversation(
            values, where, default_id=record_id, default_source=source, options=options, images=images or None
        )
    if not endings:
        found = ", ".join([*sample.files, *sample.unused][:8]) or "links"
        raise Refusal("missing image", f"the sample has no image, only {found}. Images end in {', '.join(_IMAGES)}")
    question = [IMAGE] * len(images) + ([text_part(options.instruction)] if options.instruction else [])
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [text_part(_caption(sample.files, values))]},
    ]
    return Conversation(where, record_id, source, messages, images)


def _kind(ending: str) -> str:
    """Returns the part of an ending after its last dot."""
    return ending.rpartition(".")[2]


def _image_endings(files: dict[str, bytes]) -> list[str]:
    """Returns the endings of a sample's images; numbered ones are in the order of their numbers."""
    images = [ending for ending in files if _kind(ending) in _IMAGES]
    images = [ending for ending in images if ending in _IMAGES or _NUMBERED.fullmatch(ending)] or images
    numbers = {ending: [int(number) for number in re.findall(r"\d+", ending)] for ending in images}
    return sorted(images, key=numbers.get)


def _named_images(values: dict[str, Any], sample: _Sample, endings: Sequence[str]) -> list[bytes] | None:
    """Returns the images in the order in which the sample's .json names their files, or None if it does not."""
    name = posixpath.basename(sample.key).lower()
    by_name = {f"{name}.{ending}": sample.files[ending] for ending in endings}
    by_name |= {ending: sample.files[ending] for ending in endings}
    named = fields.as_list(fields.first_present(values, fields.IMAGE_FIELDS))
    found = [by_name.get(posixpath.basename(path).lower()) for path in named if isinstance(path, str)]
    return found if found and None not in found and len(found) == len(named) else None


def _json(files: dict[str, bytes]) -> dict[str, Any]:
    """Returns the content of a sample's .json, or nothing if it has none or if a text makes it unnecessary."""
    ending = _answer_ending(files, ("json",))
    if ending is None:
        return {}
    try:
        values = json.loads(files[ending].decode("utf-8"))
        values = {"conversations": values} if isinstance(values, list) and values else values
        return expect_object(values, "the sample's .json")
    except UnicodeDecodeError as error:
        problem = Refusal("text encoding", f"the sample's .json is not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        problem = Refusal("unreadable record", f"the sample's .json is not valid JSON: {error}")
    except Refusal as refusal:
        problem = refusal
    if _answer_ending(files, _ANSWERS) != ending:
        return {}
    raise problem


def _caption(files: dict[str, bytes], values: dict[str, Any]) -> str:
    """Returns the caption of a sample, or its label if it has no caption."""
    ending = _answer_ending(files, _ANSWERS)
    if ending is not None and _kind(ending) == "json":
        if (caption := layouts.caption(values)) is not None:
            return expect_text(caption, "the caption").strip()
        ending = _answer_ending(files, ("cls",))
    if ending is None:
        raise Refusal("empty conversation", "the sample has no caption, neither in a .txt file nor in a .json file")
    try:
        return files[ending].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Refusal("text encoding", f"the caption is not UTF-8 ({error.reason})") from error


def _answer_ending(files: dict[str, bytes], kinds: Sequence[str]) -> str | None:
    """Returns the ending of the file of one of these kinds with the fewest dots, or None."""
    found = [ending for kind in kinds for ending in files if _kind(ending) == kind]
    return min(found, key=lambda ending: ending.count("."), default=None)


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
            if kind := _OTHER_MEDIA.get(_kind(ending)):
                sample.problem = fields.other_media(kind, "among its files", posixpath.basename(name))
            if _kind(ending) not in _USED_ENDINGS:
                sample.unused.append(ending)
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
        if content := describe_other_content(file.read(HEAD_BYTES), "tar", "gzip"):
            raise _DamagedArchive(0, f"the file is {content}")
        file.seek(0)
        # Detect gzip by its magic number, because the file name need not say so.
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.open(file) if compressed else contextlib.nullcontext(file) as unpacked:
            yield unpacked
