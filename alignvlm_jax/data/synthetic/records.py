"""Drawn documents as records. Separate from `corpus.py` so that drawing processes need not import TFDS."""

import io
from typing import Any

from alignvlm_jax.data.synthetic.document import Document, draw_document

_COMPRESSION = 1  # scan noise hardly compresses; a higher level takes three times as long and saves a tenth


def to_record(document: Document) -> dict[str, Any]:
    """Returns the record of a document, with its image as PNG."""
    encoded = io.BytesIO()
    document.image.save(encoded, "PNG", compress_level=_COMPRESSION)
    return {
        "image": encoded.getvalue(),
        "id": document.id,
        "source": document.family,
        "font": document.font,
        "transcription": document.transcription,
        "questions": list(document.questions),
        "answers": list(document.answers),
    }


def draw_records(seed: int, split: str, start: int, stop: int) -> list[dict[str, Any]]:
    """Returns the records of documents `start` to `stop - 1` of a split."""
    return [to_record(draw_document(seed, split, index)) for index in range(start, stop)]
