r"""Parquet files of conversations, in the schemas common on the Hugging Face Hub.

The columns may be "messages", LLaVA's "conversations", or "texts" as in the Cauldron:

    images [{bytes, path}] | messages      [{role: "user", content: "<image>What is this?"}, {role: "assistant", ...}]
                             or content as [{type: "image"}, {type: "text", text: "What is this?"}]
    image {bytes, path}    | conversations [{from: "human", value: "<image>\nWhat is this?"}, {from: "gpt", ...}]
    images [{bytes, path}] | texts         [{user: "What is this?", assistant: "A bus.", source: "vqav2"}]

Content with several parts states the positions of images itself: `<image>` in its texts stays text. The Cauldron's
questions are about all images of the row, which come first.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data.formats import llava, parquet_files
from alignvlm_jax.data.formats.conversation import (
    IMAGE,
    ROLES,
    Conversation,
    FormatOptions,
    Message,
    Refusal,
    Refused,
    Slice,
    expect_list,
    expect_object,
    expect_text,
    text_message,
    text_or_default,
    text_part,
)

SUFFIXES = (".parquet",)
_COLUMNS = ("id", "images", "image", "messages", "conversations", "texts", "source", "data_source")


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of row groups."""
    return parquet_files.plan_files(files, options)


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice."""
    stem = Path(piece.file).stem
    for number, row in parquet_files.read_slice(piece, _COLUMNS):
        where, record_id = f"{piece.file}: row {number + 1}", f"{stem}:{number}"
        try:
            if isinstance(row, Refusal):
                raise row
            record_id = text_or_default(row.get("id"), record_id)
            images = [parquet_files.image_source(image) for image in _images(row)]
            messages, order = _messages(row, len(images))
            yield Conversation(
                where=where,
                id=record_id,
                source=options.source or _source(row, stem),
                messages=messages,
                images=[images[i] for i in order],
            )
        except Refusal as refusal:
            yield Refused(where, record_id, refusal.kind, str(refusal))


def _messages(row: dict[str, Any], num_images: int) -> tuple[list[Message], list[int]]:
    """Returns the messages and the index of the image for each mark: in order, unless the parts number the images."""
    in_order = list(range(num_images))
    if row.get("messages") is not None:
        messages = [expect_object(entry, "a message") for entry in expect_list(row["messages"], "'messages'")]
        numbers = [part.get("index") for message in messages for part in _image_parts(message)]
        return [_message(message) for message in messages], _image_order(numbers, num_images)
    if row.get("conversations") is not None:
        return llava.turns(row["conversations"]), in_order
    if row.get("texts") is not None:
        return _cauldron_messages(expect_list(row["texts"], "'texts'"), num_images), in_order
    raise Refusal("unreadable record", "the row has neither messages, nor conversations, nor texts")


def _message(message: dict[str, Any]) -> Message:
    """Returns a message whose content is a text or a list of parts."""
    role, content = message.get("role"), message.get("content")
    # In plain text, `<image>` marks the images. Parts state the places of images themselves.
    if not isinstance(content, list):
        return text_message(role, content)
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal("roles", f"a message has the role {role!r}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": [_part(expect_object(part, "a part")) for part in content]}


def _part(part: dict[str, Any]) -> dict[str, str]:
    """Returns a part of a message."""
    if part.get("type") == "image":
        return IMAGE
    if part.get("type") == "text":
        return text_part(expect_text(part.get("text"), "the text of a part"))
    raise Refusal(
        "unreadable record", f"a part of a message has the type {part.get('type')!r}, expected 'text' or 'image'"
    )


def _image_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parts of a message that stand for images."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def _image_order(numbers: Sequence[Any], num_images: int) -> list[int]:
    """Returns the image indices of the marks, from the numbers in the parts if all of them have one."""
    if not numbers or any(number is None for number in numbers):
        return list(range(num_images))
    if any(not isinstance(number, int) or not 0 <= number < num_images for number in numbers):
        raise Refusal("image marks", f"the parts refer to the images {numbers[:20]}, but there are {num_images}")
    return list(numbers)


def _cauldron_messages(texts: Sequence[Any], num_images: int) -> list[Message]:
    """Returns the messages of the Cauldron's texts, with all images before the first question."""
    messages = []
    # An entry holds a question and its answer.
    for turn in (expect_object(turn, "a text") for turn in texts):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": [text_part(expect_text(turn.get(role), f"the {role}'s text"))]})
    if messages:
        messages[0]["content"][:0] = [IMAGE] * num_images
    return messages


def _images(row: dict[str, Any]) -> list[Any]:
    """Returns the images of a row, from either column."""
    images = row["images"] if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def _source(row: dict[str, Any], stem: str) -> str:
    """Returns the name of the row's data set, by default the name of the file."""
    for value in (row.get("source"), row.get("data_source")):
        if isinstance(value, str) and value:
            return value
    return stem
