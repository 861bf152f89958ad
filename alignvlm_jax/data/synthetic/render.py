"""Renders a page: ink on tinted paper, rotated by a degree or two, as from a scanner."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from alignvlm_jax.data.synthetic.dice import Dice
from alignvlm_jax.data.synthetic.fonts import Face, glyph_image
from alignvlm_jax.data.synthetic.layout import Run, Shape

_INKS = ((20, 20, 24), (45, 45, 50), (10, 10, 10), (20, 30, 90), (90, 25, 30), (20, 70, 40), (60, 40, 80))
_MARKS = ((90, 120, 190), (200, 120, 90), (110, 170, 120), (150, 150, 155), (190, 160, 80), (150, 110, 170))


@dataclasses.dataclass(frozen=True)
class Look:
    """Colors and scan defects of a page.

    Attributes:
      paper: color of the paper.
      ink: color of the text.
      mark: color of bars and curves.
      gray: whether the scan has no colors.
      noise: standard deviation of the grain.
      blur: radius of the blur in px.
      shade: change of brightness from the middle to the bottom of the page.
      speckles: number of specks of dust.
    """

    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    mark: tuple[int, int, int]
    gray: bool
    noise: float
    blur: float
    shade: float
    speckles: int


def draw_look(dice: Dice) -> Look:
    """Returns random colors and scan defects."""
    light = dice.integer(228, 255)
    tint = dice.pick(((0, 0, 0), (0, 0, 0), (0, 3, 14), (0, 5, 5), (10, 4, 0), (6, 0, 8)))
    return Look(
        paper=tuple(light - t for t in tint),
        ink=dice.pick(_INKS[:3]) if dice.chance(0.65) else dice.pick(_INKS),
        mark=dice.pick(_MARKS),
        gray=dice.chance(0.5),
        noise=dice.uniform(2.0, 7.0),
        blur=dice.uniform(0.3, 0.5) if dice.chance(0.25) else 0.0,
        shade=dice.uniform(-14.0, 14.0),
        speckles=dice.integer(1, 12) if dice.chance(0.2) else 0,
    )


def render_page(
    size: tuple[int, int],
    *,
    origin: tuple[float, float],
    angle: float,
    face: Face,
    runs: list[Run],
    shapes: list[Shape],
    look: Look,
    generator: np.random.Generator,
) -> Image.Image:
    """Returns the page as an RGB image.

    Args:
      size: width and height.
      origin: position of the content.
      angle: rotation in degrees, counter-clockwise.
      face: face of the text.
      runs: text.
      shapes: shapes under the text.
      look: colors and scan defects.
      generator: source of the scan noise.
    """
    page = Image.new("RGB", size, look.paper)
    draw = ImageDraw.Draw(page)
    _draw_shapes(draw, origin, shapes, look)
    left, top = origin
    for run in runs:
        # Round the baseline once per run, so that all its letters are at the same height.
        x, baseline = left + run.x, round(top + run.baseline)
        for character in run.text:
            if character != " ":
                glyph, dx, dy = glyph_image(face.font, face.size, character)
                # Center the glyph in its cell.
                pen = round(x + (face.pitches[character] - face.advances[character]) / 2)
                draw.bitmap((pen + dx, baseline + dy), glyph, fill=look.ink)
            x += face.pitches[character]
    # The scanner: rotation, blur, and noise on top of both.
    page = page.rotate(angle, Image.Resampling.BILINEAR, fillcolor=look.paper)
    if look.blur:
        page = page.filter(ImageFilter.GaussianBlur(look.blur))
    return _scan(page, look, generator)


def _draw_shapes(draw: ImageDraw.ImageDraw, origin: tuple[float, float], shapes: list[Shape], look: Look) -> None:
    """Draws the shapes, with their content coordinates moved to `origin`."""
    colors = {
        "rule": look.ink,
        "faint": tuple((p + i) // 2 for p, i in zip(look.paper, look.ink, strict=True)),
        "band": tuple((6 * p + m) // 7 for p, m in zip(look.paper, look.mark, strict=True)),
        "mark": look.mark,
        "paper": look.paper,
    }
    left, top = origin
    for shape in shapes:
        color = colors[shape.color]
        if shape.kind == "dot":
            x, y, radius = shape.points
            box = (left + x - radius, top + y - radius, left + x + radius, top + y + radius)
            draw.ellipse(box, fill=look.ink)
            continue
        # Coordinates are x and y in turn.
        points = [round(p + (top if i % 2 else left)) for i, p in enumerate(shape.points)]
        if shape.kind == "line":
            draw.line(points, fill=color, width=shape.width)
        elif shape.kind == "fill":
            draw.rectangle(points, fill=color)
        else:
            draw.rectangle(points, outline=color)


def _scan(page: Image.Image, look: Look, generator: np.random.Generator) -> Image.Image:
    """Adds grain, uneven light and specks of dust; some scans are without colors."""
    pixels = np.asarray(page.convert("L") if look.gray else page, np.float32)
    height, width = pixels.shape[:2]
    grain = generator.standard_normal((height, width), np.float32) * np.float32(look.noise)
    # Brightness changes linearly from top to bottom.
    grain += np.linspace(-look.shade, look.shade, height, dtype=np.float32)[:, None]
    # Specks of dust are single dark pixels.
    if look.speckles:
        rows, columns = generator.integers(0, (height, width), (look.speckles, 2)).T
        grain[rows, columns] -= 90
    pixels = pixels + (grain if look.gray else grain[..., None])
    scanned = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return scanned.convert("RGB") if look.gray else scanned
