"""Faces to print with: real fonts (those matplotlib ships), set at a pitch near one character per vision patch.

A face is a font at a digit advance of 6.3 to 7.6 px. Narrow characters (`I`, `.`, `l`) get a cell of at least 0.9 of a
digit, as on a typewriter, so a patch of 8 px never holds more than about one; wide ones (`W`, `M`) keep their advance.
"""

import dataclasses
import functools
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Digit advances a font may be set at: fonts whose capitals are wide for their digits stop earlier.
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
_NARROWEST_CELL = 0.9  # of a digit
_STEP = 0.1  # advances come in steps of this, so that glyph pictures can be kept
_REFERENCE_SIZE = 200


@dataclasses.dataclass(frozen=True)
class Face:
    """A font at one size. Lengths in px; a glyph sits in a cell as wide as its pitch and as tall as a capital."""

    font: str
    size: float
    digit: float
    space: float
    capital: float  # the mean capital's pitch
    cap_height: float
    pitches: dict[str, float]
    advances: dict[str, float]

    def width(self, text: str) -> float:
        pitches = self.pitches
        return sum([pitches[character] for character in text])


def advance_range(font: str) -> tuple[float, float]:
    """The digit advances, in px, this font may be set at."""
    return _ADVANCES[font]


def get_face(font: str, digit_advance: float) -> Face:
    """The face whose digits advance by about so many px."""
    return _face(font, round(digit_advance / _STEP))


@functools.cache
def glyph_picture(font: str, size: float, character: str) -> tuple[Image.Image, int, int]:
    """Coverage of one glyph (mode L, cropped to its ink) and where its corner lies from the pen on the baseline."""
    side = int(2 * size) + 4
    pen = side // 2
    canvas = Image.new("L", (side, side), 0)
    ImageDraw.Draw(canvas).text((pen, pen), character, fill=255, font=_load(font, size), anchor="ls")
    box = canvas.getbbox()
    return canvas.crop(box), box[0] - pen, box[1] - pen


@functools.cache
def _face(font: str, steps: int) -> Face:
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
    """Advance of each character and height of a capital, for a font of size 1."""
    loaded = _load(font, _REFERENCE_SIZE)
    _, top, _, bottom = loaded.getbbox("H", anchor="ls")
    return {c: loaded.getlength(c) / _REFERENCE_SIZE for c in CHARACTERS}, (bottom - top) / _REFERENCE_SIZE


@functools.cache
def _load(font: str, size: float) -> ImageFont.FreeTypeFont:
    # BASIC layout: one glyph at a time needs no shaping, and Raqm is not in every Pillow build.
    return ImageFont.truetype(str(_font_folder() / f"{font}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _font_folder() -> Path:
    # Found without importing matplotlib, which would cost every worker process half a second.
    return Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
