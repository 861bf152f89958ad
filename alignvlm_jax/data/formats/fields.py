"""Reads the fields of records as publishers write them: absent values, both layouts of nested lists, and images.

Tools that load JSON into a table want every record to have every column, so null, "", [] and NaN all mean that there is
no value. A list of objects may be stored as a struct of lists, as `datasets` does for a `Sequence` of named fields, or
as JSON text in a column. An image may be bytes, a path, both in one object, a data URL or base64 text.
"""

import json
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from alignvlm_jax.data.data_urls import decode_base64, decode_data_url
from alignvlm_jax.data.formats.conversation import expect_list, expect_object, expect_text
from alignvlm_jax.data.refusal import Refusal

# Fields that hold images, in the order in which they are tried.
IMAGE_FIELDS = ("images", "image", "image_path", "img_path", "image_paths", "image_base64_str")
# Fields that hold the image of a caption: ImageFolder's, and WebDataset's as the Hub converts them to Parquet.
CAPTIONED_FIELDS = ("file_name", "jpg", "jpeg", "png", "webp")
# Numbered columns with an image each, as in the multi-image data of LLaVA-NeXT-Interleave.
NUMBERED_IMAGE = re.compile(r"image_?(\d+)")
_OTHER_MEDIA = {"video": "a video", "videos": "a video", "audio": "audio", "audios": "audio"}
_MEDIA_ENDINGS = {
    "a video": (".mp4", ".webm", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus"),
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKETS = ("gs", "s3")
# How the base64 text of a JPEG, PNG, GIF, WebP, TIFF or BMP file begins. Paths that begin like this are much shorter.
_BASE64_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk)[A-Za-z0-9+/_=\s-]+\Z")
_MIN_BASE64_CHARACTERS = 80
_MAX_DEPTH = 20


def is_absent(value: Any, depth: int = 0) -> bool:
    """Returns whether a value stands for nothing: null, NaN, false, blank text, or a list or object of such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping | list):
        entries = value.values() if isinstance(value, Mapping) else value
        # JSON may be nested deeper than Python can call functions.
        return depth < _MAX_DEPTH and all(is_absent(entry, depth + 1) for entry in entries)
    return value is None or value is False or value == b"" or isinstance(value, float) and math.isnan(value)


def first_present(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns the value of the first of these fields that holds something, or None."""
    return next((record[name] for name in names if not is_absent(record.get(name))), None)


def as_list(value: Any) -> list[Any]:
    """Returns a list as it is, another value as a list of one, and an absent value as an empty list."""
    if is_absent(value):
        return []
    return value if isinstance(value, list) else [value]


def as_objects(value: Any, what: str, entry: str) -> list[dict[str, Any]]:
    """Returns a list of objects, which may be stored as a struct of lists or as JSON text.

    Args:
      value: value of the field.
      what: name of the field, for the reason of a refusal.
      entry: name of one object.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Refusal("unreadable record", f"{what} is text that is not valid JSON: {error}") from error
    if is_struct_of_lists(value):
        value = _rows(value, what)
    return [expect_object(row, entry) for row in expect_list(value, what) if row is not None]


def is_struct_of_lists(value: Any) -> bool:
    """Returns whether a value is an object whose fields are all lists or null."""
    if not isinstance(value, dict):
        return False
    fields = [field for field in value.values() if field is not None]
    return bool(fields) and all(isinstance(field, list) for field in fields)


def record_images(record: Mapping[str, Any], names: Sequence[str] = IMAGE_FIELDS) -> list[bytes | str | None]:
    """Returns the images of a record in order: bytes, or paths. An entry is None where a list holds nothing."""
    value = first_present(record, names)
    if value is None:
        numbered = {int(match[1]): record[name] for name in record if (match := NUMBERED_IMAGE.fullmatch(name))}
        value = [numbered[number] for number in sorted(numbered)]
    if is_struct_of_lists(value):
        value = _rows(value, "the images")
    return [image_source(image) for image in as_list(value)]


def image_source(value: Any, depth: int = 0) -> bytes | str | None:
    """Returns an image as bytes or as a path, or None if there is none.

    Args:
      value: {"bytes", "path"} as `datasets` stores an image, bytes alone, a path, a data URL, or base64 text.
      depth: number of objects around the value.

    Raises:
      Refusal: if the value is something else, such as the URL of an image on the web.
    """
    if is_absent(value):
        return None
    if isinstance(value, dict):
        found = first_present(value, ("bytes", "path", "url", "image", "image_url", "file_name", "data"))
        if found is None or depth == _MAX_DEPTH:
            fields = ", ".join(sorted(map(str, value)))
            raise Refusal(
                "unreadable record", f"an image is an object with the fields {fields}, expected bytes or path"
            )
        return image_source(found, depth + 1)
    if isinstance(value, bytes):
        return value
    return _reference(expect_text(value, "the name of an image"))


def refuse_other_media(record: Mapping[str, Any]) -> None:
    """Raises a `Refusal` if a record has a video or audio."""
    for name, kind in _OTHER_MEDIA.items():
        if not is_absent(record.get(name)):
            raise other_media(kind, f"in the field {name!r}", record[name])


def other_media(kind: str, place: str, value: Any) -> Refusal:
    """Returns the refusal of a video or audio, which is named if it is a file."""
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = first_present(value, ("path", "url", "video", "audio"))
    named = f" ({value[:120]})" if isinstance(value, str) else ""
    return Refusal(
        "unreadable record", f"the record has {kind} {place}{named}; only images are supported, so leave the record out"
    )


def _rows(value: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """Returns the rows of a struct of lists."""
    columns = {name: column for name, column in value.items() if column is not None}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in list(lengths.items())[:6])
        raise Refusal("unreadable record", f"the lists in {what} have different lengths: {found}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _reference(text: str) -> bytes | str:
    """Returns the bytes of an image given as text, or the path of one."""
    if text[:5].lower() == "data:":
        return decode_data_url(text)
    if scheme := _URL.match(text):
        if scheme[1].lower() == "file":
            return urllib.parse.unquote(urllib.parse.urlsplit(text).path)
        if scheme[1].lower() not in _BUCKETS:
            raise Refusal(
                "image path", f"the image is a URL, {text[:200]}: download it and write its path in the record instead"
            )
    for kind, endings in _MEDIA_ENDINGS.items():
        if text[-8:].lower().endswith(endings):
            raise other_media(kind, "where an image belongs", text)
    if len(text) >= _MIN_BASE64_CHARACTERS and _BASE64_IMAGE.match(text):
        return decode_base64(text, "base64 text")
    return text
