"""BigDocs-7.5M and BigDocs-Bench in Parquet: questions and answers in two columns.

    sample_id | image {bytes, path} | queries ["What is the total?", ...] | annotations ["12.50", ...]

The columns differ slightly between subsets: `identifier` or `img_id` instead of sample_id, `images` (a list) instead of
image, `query` instead of queries. Subsets without image bytes (COCO-Text, TextOCR) name a file under the image root. If
one question has several annotations, all of them are correct answers, and the first is used.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data.formats import fields, parquet_files
from alignvlm_jax.data.formats.conversation import (
    IMAGE,
    Conversation,
    FormatOptions,
    Message,
    Refusal,
    Refused,
    Slice,
    expect_text,
    text_or_default,
    text_part,
)

SUFFIXES = (".parquet",)
_IDS = ("sample_id", "identifier", "img_id")
_IMAGES = ("images", "image", "img_path", "image_[0-9]*", "image[0-9]*")
_QUERIES = ("queries", "query")
_ANSWERS = ("annotations", "annotation")
_SOURCES = ("dataset_name", "source")


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of row groups."""
    return parquet_files.plan_files(files, options)


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice."""
    columns = (*_IDS, *_IMAGES, *_QUERIES, *_ANSWERS, *_SOURCES, "video", "videos", "audio", "audios")
    stem = Path(piece.file).stem
    for number, row in parquet_files.read_slice(piece, columns):
        where, record_id = f"{piece.file}: row {number + 1}", f"{stem}:{number}"
        try:
            if isinstance(row, Refusal):
                raise row
            record_id = text_or_default(fields.first_present(row, _IDS), record_id)
            fields.refuse_other_media(row)
            images = [image for image in fields.record_images(row, _IMAGES) if image is not None]
            yield Conversation(
                where=where,
                id=record_id,
                source=options.source or text_or_default(fields.first_present(row, _SOURCES), stem),
                messages=_messages(row, len(images)),
                images=images,
            )
        except Refusal as refusal:
            yield Refused(where, record_id, refusal.kind, str(refusal))


def _messages(row: dict[str, Any], num_images: int) -> list[Message]:
    """Returns the messages of a row, with all images before the first question."""
    # If there is no query, the image alone is the question.
    queries = [expect_text(query, "a query") for query in fields.as_list(fields.first_present(row, _QUERIES))] or [""]
    answers = [expect_text(answer, "an annotation") for answer in fields.as_list(fields.first_present(row, _ANSWERS))]
    if len(queries) == 1:  # several annotations are alternatives
        answers = answers[:1]
    if len(queries) != len(answers):
        raise Refusal("unreadable record", f"the row has {len(queries)} queries for {len(answers)} annotations")
    messages = []
    for query, answer in zip(queries, answers, strict=True):
        messages.append({"role": "user", "content": [text_part(query)] if query else []})
        messages.append({"role": "assistant", "content": [text_part(answer)]})
    messages[0]["content"][:0] = [IMAGE] * num_images
    return messages
