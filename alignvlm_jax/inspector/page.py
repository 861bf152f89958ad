"""Builds the self-contained HTML file: web/page.html with the style, the scripts, the image and the data inlined."""

import base64
import html
import io
import json
import os
import pathlib

import PIL.Image

from alignvlm_jax.output_files import open_atomically

_WEB = pathlib.Path(__file__).parent / "web"
# The files are concatenated into one script, in this order, because a file uses the top-level names of those before it.
_SCRIPTS = ("data", "places", "state", "drawing", "patch", "search", "answer", "controls", "facts")
_LONGEST_SIDE = 2048
_LARGEST_PNG = 600_000


def render(data: dict, *, title: str) -> str:
    """Returns the HTML of the page.

    Args:
      data: result of `inspection.Inspection.to_json`.
      title: title of the page.
    """
    parts = {
        "title": html.escape(title),
        "style": _read("page.css"),
        # Only "</script" and "<!--" are special inside a script element; neither occurs if "<" is escaped.
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join(_read(f"{name}.js") for name in _SCRIPTS),
    }
    pieces = [_read("page.html")]
    # Each step splits only the remaining template, so a placeholder inside inserted text is left alone.
    for name, text in parts.items():
        before, after = pieces.pop().split("{{" + name + "}}")
        pieces += [before, text, after]
    return "".join(pieces)


def write(text: str, file: str | os.PathLike) -> None:
    """Writes the file atomically.

    Raises:
      UserError: if the file cannot be written.
    """
    with open_atomically(file) as stream:
        stream.write(text)


def image_url(image: PIL.Image.Image) -> str:
    """Returns the image as a data URL.

    The longer side is reduced to 2048 pixels. The image is a PNG if that takes at most 0.6 MB, otherwise a JPEG.
    """
    image = image.convert("RGB")
    if max(image.size) > _LONGEST_SIDE:
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), PIL.Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    kind = "png"
    if encoded.tell() > _LARGEST_PNG:
        encoded, kind = io.BytesIO(), "jpeg"
        image.save(encoded, "JPEG", quality=85, optimize=True, progressive=True)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _read(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")
