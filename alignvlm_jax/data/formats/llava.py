r"""LLaVA's JSON: a list of records with turns, or one record per line; and YAML mixtures of such files.

    {"id": "17", "image": "coco/000.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}

`image` may be a list (also under the name `images`). It is missing if a conversation has no images.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data.formats import json_files, mixture
from alignvlm_jax.data.formats.conversation import (
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
)

_MIXTURES = (".yaml", ".yml")
SUFFIXES = (".json", ".jsonl", *_MIXTURES)


def referenced_files(files: Sequence[str]) -> list[str]:
    """Returns the files that mixtures name."""
    mixtures = [file for file in files if file.endswith(_MIXTURES)]
    return [part.file for file in mixtures for part in mixture.read_mixture(file)]


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of JSON files, including files that mixtures name."""
    slices = []
    for file in files:
        if file.endswith(_MIXTURES):
            for part in mixture.read_mixture(file):
                picks = part.sampling.choose(json_files.count_records(part.file)) if part.sampling else None
                slices += json_files.plan_file(part.file, options, picks)
        else:
            slices += json_files.plan_file(file, options)
    return slices


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice."""
    stem = Path(piece.file).stem

    def convert(record: dict[str, Any], where: str, number: int) -> Conversation:
        return _conversation(record, where, stem, number, options)

    return json_files.read_conversations(piece, options, convert)


def turns(conversations: Any) -> list[Message]:
    """Returns the messages of LLaVA's turns."""
    turns = [expect_object(turn, "a turn") for turn in expect_list(conversations, "'conversations'")]
    # Some data sets use the keys of the messages format instead of LLaVA's.
    return [text_message(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]


def _conversation(record: dict[str, Any], where: str, stem: str, number: int, options: FormatOptions) -> Conversation:
    """Returns the conversation of a record."""
    if "video" in record:
        raise Refusal("unreadable record", "the record is about a video; only images are supported")
    return Conversation(
        where=where,
        id=text_or_default(record.get("id"), f"{stem}:{number}"),
        source=options.source or text_or_default(record.get("data_source"), stem),
        messages=turns(record.get("conversations")),
        images=_image_paths(record),
    )


def _image_paths(record: dict[str, Any]) -> list[str]:
    """Returns the paths of a record's images."""
    images = record.get("image", record.get("images"))
    if images is None or images == "":
        return []
    images = images if isinstance(images, list) else [images]
    return [expect_text(image, "the name of an image") for image in images]
