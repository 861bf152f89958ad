"""mPLUG's DocDownstream (also DocStruct and DocReason): one record per line, with images marked `<|image|>`.

{"image": ["./imgs/DocVQA/1.png"], "task_name": "qa_sft", "dataset_name": "DocVQA", "messages": [
    {"role": "user", "content": "<|image|>What is the date?"}, {"role": "assistant", "content": "1/8/93"}]}
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data.formats import fields, json_files
from alignvlm_jax.data.formats.conversation import (
    Conversation,
    FormatOptions,
    Refused,
    Slice,
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
    fields.refuse_other_media(record)
    messages = fields.as_objects(record.get("messages"), "'messages'", "a message")
    return Conversation(
        where=where,
        id=text_or_default(record.get("id"), f"{stem}:{number}"),
        source=options.source or text_or_default(record.get("dataset_name"), stem),
        messages=[text_message(message.get("role"), message.get("content"), IMAGE_MARK) for message in messages],
        images=[image for image in fields.record_images(record) if image is not None],
    )
