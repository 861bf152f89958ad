"""What a page becomes before the language model reads it, as one HTML file to look at: `alignvlm inspect`.

    geometry.py      where on the page each patch looks
    words.py         each patch's likeliest words, and how undecided it is
    attribution.py   which patches an answer leaned on
    packing.py       all of that in few bytes
    page.py          the bytes, the picture, and the HTML, style and scripts of web/ in one file
    inspection.py    the order of it all: from a reader and a picture to an `Inspection`

docs/inspector.md says how to read the page and what its numbers are.
"""

from alignvlm_jax.inspector.inspection import InspectConfig, Inspection, inspect_image, inspect_to_file

__all__ = ["InspectConfig", "Inspection", "inspect_image", "inspect_to_file"]
