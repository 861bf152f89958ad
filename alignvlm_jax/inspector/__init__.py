"""The inspector: one HTML file that shows a page in the words that the language model reads (`alignvlm inspect`).

    geometry.py      the rectangle of the page that each patch covers
    words.py         the likeliest words of each patch, and the entropy of its distribution
    attribution.py   the contribution of each patch to an answer
    packing.py       compact encoding of all of that
    page.py          the HTML file: data, image, and the style and scripts of web/
    inspection.py    the entry point: from a reader and an image to an `Inspection`

docs/inspector.md explains how to read the page and what its numbers mean.
"""

from alignvlm_jax.inspector.inspection import InspectConfig, Inspection, inspect_image, inspect_to_file

__all__ = ["InspectConfig", "Inspection", "inspect_image", "inspect_to_file"]
