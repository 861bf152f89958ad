"""mPLUG's DocDownstream (also DocStruct and DocReason): one record per line, with images marked `<|image|>`.

{"image": ["./imgs/DocVQA/1.png"], "task_name": "qa_sft", "dataset_name": "DocVQA", "messages": [
    {"role": "user", "content": "<|image|>What is the date?"}, {"role": "assistant", "content": "1/8/93"}]}
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data.formats import json_files
from alignvlm_jax.data.formats.conversation import (
    Conversation,
    FormatOptions,
    Refused,
    Slice,
    expect_list,
    expect_object,
    expect_text,
    text_message,
    text_or_default,
)

SUFFIXES = (".jsonl",)
IMAGE_MARK = "<|image|>"


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of lines."""
    return [piece for file in files for piece in json_files.plan_file(file, options)]


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice."""
    stem = Path(piece.file).stem

    def convert(record: dict[str, Any], where: str, number: int) -> Conversation:
        return _conversation(record, where, stem, number, options)

    return json_files.read_conversations(piece, options, convert)


def _conversation(record: dict[str, Any], where: str, stem: str, number: int, options: FormatOptions) -> Conversation:
    """Returns the conversation of a record."""
    messages = [expect_object(message, "a message") for message in expect_list(record.get("messages"), "'messages'")]
    return Conversation(
        where=where,
        id=text_or_default(record.get("id"), f"{stem}:{number}"),
        source=options.source or text_or_default(record.get("dataset_name"), stem),
        messages=[text_message(message.get("role"), message.get("content"), IMAGE_MARK) for message in messages],
        images=[expect_text(image, "the name of an image") for image in expect_list(record.get("image"), "'image'")],
    )
