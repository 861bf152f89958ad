"""What every format yields: a conversation not yet checked, or a record refused.

Messages have the shape that `chat.ChatTokenizer` takes, so nothing has to be translated when they are read for
training, and an image's place is a part of its own: whatever a user typed, `<image>` or `<|eot_id|>`, stays text.

    "<image>\\nWhat is the total?"
    -> {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]}
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from alignvlm_jax.errors import UserError

Part = dict[str, str]
Message = dict[str, Any]

IMAGE: Part = {"type": "image"}
IMAGE_MARK = "<image>"

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class Refusal(UserError):
    """Why a record cannot be used; `kind` is a word or two under which reasons are counted."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One example as its format has it.

    where: the file and the record in it, for reports.
    id, source: what the example is called, and the data set that it is from.
    messages: see the module docstring.
    images: the bytes of image files, or their paths under the image root, in the order of the marks.
    """

    where: str
    id: str
    source: str
    messages: Sequence[Message]
    images: Sequence[bytes | str]


@dataclasses.dataclass(frozen=True)
class Refused:
    """One record that is left out: where it is, what it is called if it says so, and why, in brief and in full."""

    where: str
    id: str
    kind: str
    why: str


@dataclasses.dataclass(frozen=True)
class Slice:
    """Records that are converted together.

    file: the file they are in.
    start, stop: where in it, in the format's own unit: bytes of a JSON file, row groups of a Parquet file.
    first: the number of the first of them in the file.
    records: how many will be used or refused, where that is known before reading.
    picks: the numbers of those wanted; None for all.
    """

    file: str
    start: int = 0
    stop: int = 0
    first: int = 0
    records: int | None = None
    picks: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class FormatOptions:
    """What `plan` and `read` want to know.

    records_per_shard: cut slices of about so many records.
    source: the name of the data set; by default what the records say, or else the name of the file.
    instruction: what the user says beside the image where the data are image and caption only; by default nothing.
    max_record_bytes: do not even parse larger records.
    """

    records_per_shard: int = 2000
    source: str | None = None
    instruction: str = ""
    max_record_bytes: int = 64 * 2**20


def text_message(role: Any, text: Any, mark: str = IMAGE_MARK) -> Message:
    """A message written as a role and one text, in which marks stand for images.

    Only the user shows images: in an answer, and in the system's words, a mark is text like any other. White space that
    merely sets images apart from the text before or after them is dropped; between images and text it is kept.
    """
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal("roles", f"a message's role is {role!r}, not one of {', '.join(ROLES)}")
    role = ROLES[role]
    text = expect_text(text, "a message's text")
    if role != "user":
        return {"role": role, "content": [text_part(text)]}
    return {"role": role, "content": _split(text, mark)}


def text_part(text: str) -> Part:
    """A piece of text within a message."""
    return {"type": "text", "text": text}


def expect_text(value: Any, what: str) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise Refusal("unreadable record", f"{what} is {_kind(value)}, not text")
    return value


def expect_list(value: Any, what: str) -> list[Any]:
    """The value, if it is a list."""
    if not isinstance(value, list):
        raise Refusal("unreadable record", f"{what} is {_kind(value)}, not a list")
    return value


def expect_object(value: Any, what: str) -> dict[str, Any]:
    """The value, if it is an object of named fields."""
    if not isinstance(value, dict):
        raise Refusal("unreadable record", f"{what} is {_kind(value)}, not an object with named fields")
    return value


def name_of(value: Any, otherwise: str) -> str:
    """An id or a source as text: data sets number or name their records."""
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    return otherwise


def _split(text: str, mark: str) -> list[Part]:
    mark = re.escape(mark)
    text = re.sub(rf"\A\s*(?:{mark}\s*)+", lambda run: re.sub(r"\s+", "", run.group()), text)
    text = re.sub(rf"(?:\s*{mark})+\s*\Z", lambda run: re.sub(r"\s+", "", run.group()), text)
    parts = []
    for piece in re.split(f"({mark})", text):
        if re.fullmatch(mark, piece):
            parts.append(IMAGE)
        elif piece:
            parts.append(text_part(piece))
    return parts


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
