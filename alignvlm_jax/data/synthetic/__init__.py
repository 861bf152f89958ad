"""Synthetic documents, small enough to learn to read in minutes: receipts, forms, tables and charts.

`draw_document(seed, split, index)` is a pure function: the document depends only on these three values.

    from alignvlm_jax.data.synthetic import draw_document
    document = draw_document(0, "train", 7)
    document.image.show(); print(document.transcription, document.questions, document.answers)

Two rules keep the held-out set separate, and only these: which values a split may print (`values.split_of`), and which
font only the held-out split may use (`fonts.HELD_OUT_FONT`).
"""

from alignvlm_jax.data.synthetic.document import FAMILIES, Document, Glyph, draw_document
from alignvlm_jax.data.synthetic.fonts import CHARACTERS, HELD_OUT_FONT, TRAINING_FONTS
from alignvlm_jax.data.synthetic.values import SPLITS, split_of

__all__ = [
    "CHARACTERS",
    "FAMILIES",
    "HELD_OUT_FONT",
    "SPLITS",
    "TRAINING_FONTS",
    "Document",
    "Glyph",
    "draw_document",
    "split_of",
]
