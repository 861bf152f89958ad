"""Faces for printing: real fonts (those included in matplotlib), at about one character per vision patch.

A face is a font with a digit advance of 6.3 to 7.6 px. A narrow character (`I`, `.`, `l`) gets a cell of at least 0.9
digits, as on a typewriter, so a patch of 8 px never holds much more than one. Wide ones (`W`, `M`) keep their advance.
"""

import dataclasses
import functools
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Range of digit advances of a font. It ends earlier for fonts whose capitals are wide compared to their digits.
_NORMAL, _WIDE_CAPITALS = (6.5, 7.6), (6.3, 7.0)
_ADVANCES = {
    "DejaVuSans": _NORMAL,
    "DejaVuSans-Bold": _NORMAL,
    "DejaVuSansMono": _NORMAL,
    "DejaVuSansMono-Bold": _NORMAL,
    "STIXGeneral": _WIDE_CAPITALS,
    "STIXGeneralBol": _WIDE_CAPITALS,
    "cmss10": _WIDE_CAPITALS,
    "cmtt10": _NORMAL,
    "DejaVuSerif": _NORMAL,
}
HELD_OUT_FONT = "DejaVuSerif"
TRAINING_FONTS = tuple(font for font in _ADVANCES if font != HELD_OUT_FONT)

_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHARACTERS = _CAPITALS + "abcdefghijklmnopqrstuvwxyz0123456789.-/%$#:"
_NARROWEST_CELL = 0.9  # in digits
_STEP = 0.1  # step between digit advances, so that glyph images can be cached
_REFERENCE_SIZE = 200


@dataclasses.dataclass(frozen=True)
class Face:
    """A font at one size; lengths in px. A glyph has a cell as wide as its pitch and as high as a capital."""

    font: str
    size: float
    digit: float
    space: float
    capital: float  # mean pitch of the capitals
    cap_height: float
    pitches: dict[str, float]
    advances: dict[str, float]

    def width(self, text: str) -> float:
        """Returns the width of a text."""
        pitches = self.pitches
        return sum([pitches[character] for character in text])


def advance_range(font: str) -> tuple[float, float]:
    """Returns the range of digit advances of a font, in px."""
    return _ADVANCES[font]


def get_face(font: str, digit_advance: float) -> Face:
    """Returns the face with approximately this digit advance in px."""
    return _face(font, round(digit_advance / _STEP))


@functools.cache
def glyph_image(font: str, size: float, character: str) -> tuple[Image.Image, int, int]:
    """Returns the coverage of a glyph (mode L, cropped to its ink) and its corner relative to the pen on the baseline.

    The values are (image, dx, dy).
    """
    side = int(2 * size) + 4
    pen = side // 2
    canvas = Image.new("L", (side, side), 0)
    ImageDraw.Draw(canvas).text((pen, pen), character, fill=255, font=_load(font, size), anchor="ls")
    box = canvas.getbbox()
    return canvas.crop(box), box[0] - pen, box[1] - pen


@functools.cache
def _face(font: str, steps: int) -> Face:
    """Returns the face whose digit advance is `steps` times `_STEP`."""
    advances, cap_height = _reference_metrics(font)
    digit = round(steps * _STEP, 1)
    size = round(digit / advances["0"], 2)
    pitches = {c: max(_NARROWEST_CELL * digit, size * advance) for c, advance in advances.items()}
    pitches[" "] = digit
    return Face(
        font=font,
        size=size,
        digit=digit,
        space=digit,
        capital=sum([pitches[c] for c in _CAPITALS]) / len(_CAPITALS),
        cap_height=size * cap_height,
        pitches=pitches,
        advances={c: size * advance for c, advance in advances.items()},
    )


@functools.cache
def _reference_metrics(font: str) -> tuple[dict[str, float], float]:
    """Returns the advance of each character and the height of a capital, for a font of size 1."""
    loaded = _load(font, _REFERENCE_SIZE)
    _, top, _, bottom = loaded.getbbox("H", anchor="ls")
    return {c: loaded.getlength(c) / _REFERENCE_SIZE for c in CHARACTERS}, (bottom - top) / _REFERENCE_SIZE


@functools.cache
def _load(font: str, size: float) -> ImageFont.FreeTypeFont:
    # BASIC layout: single glyphs need no shaping, and not every build of Pillow has Raqm.
    return ImageFont.truetype(str(_font_folder() / f"{font}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _font_folder() -> Path:
    # find_spec does not import matplotlib, which would cost every worker process half a second.
    return Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
