r"""The output of every format: conversations that are not checked yet, and refused records.

Messages are in the format of `chat.ChatTokenizer`, so they need no conversion when they are read for training. The
position of an image is a separate part. Text typed by a user, such as `<image>` or `<|eot_id|>`, therefore stays text.

    "<image>\nWhat is the total?"
    -> {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]}
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from alignvlm_jax.data.refusal import Refusal
from alignvlm_jax.data.shortening import shorten

Part = dict[str, str]
Message = dict[str, Any]

IMAGE: Part = {"type": "image"}
IMAGE_MARK = "<image>"

# Roles as publishers spell them, in lower case. What a tool returns is read like a question, and a call like an answer.
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "observation": "user",
    "tool": "user",
    "tool_response": "user",
    "function": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
}
TOOL_ROLES = ("observation", "tool", "tool_response", "function", "function_call", "tool_call")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One example as its format describes it.

    Attributes:
      where: file and record, for reports.
      id: id of the example.
      source: name of its data set.
      messages: see the module docstring.
      images: bytes of image files, or their paths under the image root, in the order of the image marks.
    """

    where: str
    id: str
    source: str
    messages: Sequence[Message]
    images: Sequence[bytes | str]


@dataclasses.dataclass(frozen=True)
class Refused:
    """One refused record.

    Attributes:
      where: file and record.
      id: id of the record, if it has one.
      kind: short category of the reason.
      why: full reason.
    """

    where: str
    id: str
    kind: str
    why: str

    def shortened(self) -> "Refused":
        """Returns the refusal with long texts cut, so that its line in a report stays under 1,000 bytes."""
        return Refused(shorten(self.where, 280), shorten(self.id, 120), self.kind, shorten(self.why, 480))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Records that are converted together.

    Attributes:
      file: file of the records.
      start: start of the records in the file, in the unit of the format: bytes in JSON, row groups in Parquet.
      stop: end of the records, in the same unit.
      first: number of the first record in the file.
      records: number of records, used and refused ones together, if it is known before reading.
      picks: numbers of the selected records; None selects all.
      image_root: folder that image paths start from, if the input states it; `checks.Limits` may replace it.
    """

    file: str
    start: int = 0
    stop: int = 0
    first: int = 0
    records: int | None = None
    picks: tuple[int, ...] | None = None
    image_root: str | None = None


@dataclasses.dataclass(frozen=True)
class FormatOptions:
    """Settings of a format's `plan` and `read`.

    Attributes:
      records_per_shard: approximate number of records per slice.
      source: name of the data set; by default the one stated in the records, or else the name of the file.
      instruction: text of the user next to the image, for data that have only images and captions; by default none.
      max_record_bytes: larger records are refused without parsing them.
    """

    records_per_shard: int = 2000
    source: str | None = None
    instruction: str = ""
    max_record_bytes: int = 64 * 2**20


def text_message(role: Any, text: Any, mark: str = IMAGE_MARK) -> Message:
    """Returns the message of a role and one text in which marks stand for images.

    Only the user shows images. In an answer or a system message a mark is ordinary text. White space that only
    separates images from the text before or after them is dropped; white space in the middle is kept.

    Args:
      role: role as the record states it.
      text: text of the message.
      mark: text that stands for an image.

    Raises:
      Refusal: if the role is unknown or the text is not text.
    """
    role = expect_role(role)
    text = expect_text(text, "a message's text")
    if role != "user":
        return {"role": role, "content": [text_part(text)]}
    return {"role": role, "content": _split(text, mark)}


def text_part(text: str) -> Part:
    """Returns the part of a message that is this text."""
    return {"type": "text", "text": text}


def expect_role(role: Any) -> str:
    """Returns system, user or assistant for a role as a publisher spells it, otherwise raises a `Refusal`."""
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise Refusal("roles", f"a message has the role {repr(role)[:60]}, expected one of {', '.join(ROLES)}")
    return ROLES[role.strip().lower()]


def expect_text(value: Any, what: str) -> str:
    """Returns the value if it is text, otherwise raises a `Refusal`."""
    if not isinstance(value, str):
        raise Refusal("unreadable record", f"{what} is {_kind(value)}, expected text")
    return value


def expect_list(value: Any, what: str) -> list[Any]:
    """Returns the value if it is a list, otherwise raises a `Refusal`."""
    if not isinstance(value, list):
        raise Refusal("unreadable record", f"{what} is {_kind(value)}, expected a list")
    return value


def expect_object(value: Any, what: str) -> dict[str, Any]:
    """Returns the value if it is an object with named fields, otherwise raises a `Refusal`."""
    if not isinstance(value, dict):
        raise Refusal("unreadable record", f"{what} is {_kind(value)}, expected an object with named fields")
    return value


def text_or_default(value: Any, default: str) -> str:
    """Returns an id or a source as text (data sets number or name their records), or the default if there is none."""
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    return default


def _split(text: str, mark: str) -> list[Part]:
    """Returns the parts of a text in which marks stand for images."""
    mark = re.escape(mark)
    # Drop the white space around a run of marks at the beginning, then at the end.
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
    """Returns a description of a value that has the wrong type."""
    return "missing" if value is None else f"of type {type(value).__name__}"
