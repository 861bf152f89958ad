"""Draws a document from (seed, split, index): chooses family, font and layout, then prints and scans the page."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from alignvlm_jax.data.synthetic.dice import Dice
from alignvlm_jax.data.synthetic.families import Questions, chart, form, receipt, table
from alignvlm_jax.data.synthetic.fonts import HELD_OUT_FONT, TRAINING_FONTS, advance_range, get_face
from alignvlm_jax.data.synthetic.layout import Page
from alignvlm_jax.data.synthetic.render import draw_look, render_page
from alignvlm_jax.data.synthetic.values import SPLITS, DoesNotFitError, Values
from alignvlm_jax.errors import UserError

_COMPOSERS = {"receipt": receipt.compose, "form": form.compose, "table": table.compose, "chart": chart.compose}
FAMILIES = tuple(_COMPOSERS)

_WIDTHS, _HEIGHTS = (68, 80), (96, 160)  # px
_MIN_LINE_DIGITS = 9.9  # width in digits that is enough for every family
_MARGIN = 2.0  # px, minimum
_MAX_CONTENT_HEIGHT = _HEIGHTS[1] - 2 * _MARGIN - 2
_ATTEMPTS = 200
_PLACEMENT_ATTEMPTS = 12
_HELD_OUT_FONT_SHARE = 1 / 6
_REVERSE_SHARE = 0.25  # documents with one question from a value to its name


class Glyph(NamedTuple):
    """A printed character and its cell (as wide as its pitch, as high as a capital) in px of the finished page.

    On a rotated page the box stays upright, around the rotated center.
    """

    char: str
    left: float
    top: float
    right: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class Document:
    """A page, its text, and questions that it answers."""

    id: str
    family: str
    font: str
    size: tuple[int, int]  # width and height in px, known without an image
    image: Image.Image | None
    glyphs: tuple[Glyph, ...]  # in reading order, without spaces
    lines: tuple[str, ...]  # in reading order
    transcription: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def draw_document(
    seed: int, split: str, index: int, *, family: str | None = None, font: str | None = None, render: bool = True
) -> Document:
    """Returns document `index` of a split.

    A pure function of its arguments.

    Args:
      seed: seed of the corpus.
      split: split of the document; it decides which values and fonts may be used.
      index: number of the document.
      family: family of the document; None draws one.
      font: font to print with; None draws one.
      render: whether to make the image. Everything else is the same without it.

    Raises:
      UserError: if split, family or font is unknown, or the font is not for this split.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} of synthetic documents: expected one of {', '.join(SPLITS)}")
    if family is not None and family not in FAMILIES:
        raise UserError(f"no family {family!r} of synthetic documents: expected one of {', '.join(FAMILIES)}")
    fonts = (*TRAINING_FONTS, HELD_OUT_FONT) if split == "heldout" else TRAINING_FONTS
    if font is not None and font not in fonts:
        raise UserError(f"font {font!r} is not for split {split!r}: expected one of {', '.join(fonts)}")

    dice = Dice(seed, SPLITS.index(split), index)
    family = family or dice.pick(FAMILIES)
    if font is None:
        unseen = split == "heldout" and dice.chance(_HELD_OUT_FONT_SHARE)
        font = HELD_OUT_FONT if unseen else dice.pick(TRAINING_FONTS)

    def compose(page: Page) -> Questions:
        return _COMPOSERS[family](page, Values(dice, split))

    return print_document(
        dice, compose, _choose, id=f"synthetic-{seed}-{split}-{index}", family=family, font=font, render=render
    )


def print_document(
    dice: Dice,
    compose: Callable[[Page], Questions],
    choose: Callable[[Dice, Questions], list[tuple[str, str]]],
    *,
    id: str,
    family: str,
    font: str,
    render: bool = True,
) -> Document:
    """Returns a document of any family: laid out, placed on its page, with questions, printed and scanned.

    Args:
      dice: source of all random choices.
      compose: lays out a page, as in `families/`. It is called again with a fresh page if its values do not fit.
      choose: selects questions and phrasings; returns (question, answer) pairs.
      id: id of the document.
      family: name of the family.
      font: font to print with.
      render: whether to make the image.
    """
    # Lay out the content and place it on a page, slightly rotated.
    page, questions, width = _lay_out(dice, compose, family, font)
    left = dice.uniform(_MARGIN, width - _MARGIN - page.width)
    height, top = _place_vertically(dice, page)
    angle = dice.uniform(-2, 2)
    glyphs = _place_glyphs(page, (left, top), (width, height), angle)
    # Halve the angle until every glyph is on the page.
    while not _is_inside(glyphs, width, height):
        angle /= 2
        glyphs = _place_glyphs(page, (left, top), (width, height), angle)
    # Choose the questions before rendering, so that they are the same without an image.
    selected = choose(dice, questions)
    image = None
    if render:
        look = draw_look(dice)
        image = render_page(
            (width, height),
            origin=(left, top),
            angle=angle,
            face=page.face,
            runs=page.runs,
            shapes=page.shapes,
            look=look,
            generator=dice.generator,
        )
    return Document(
        id=id,
        family=family,
        font=font,
        size=(width, height),
        image=image,
        glyphs=tuple(glyphs),
        lines=tuple(page.lines),
        transcription="\n".join(page.lines),
        questions=tuple([question for question, _ in selected]),
        answers=tuple([answer for _, answer in selected]),
    )


def _lay_out(dice: Dice, compose: Callable[[Page], Questions], family: str, font: str) -> tuple[Page, Questions, int]:
    """Lays out a page. If the values do not fit, starts again with other values."""
    for _ in range(_ATTEMPTS):
        # The page must be wide enough for the shortest line that every family can use.
        face = get_face(font, dice.uniform(*advance_range(font)))
        narrowest = max(_WIDTHS[0], math.ceil(_MIN_LINE_DIGITS * face.digit + 2 * _MARGIN))
        width = dice.integer(narrowest, _WIDTHS[1])
        spare = width - 2 * _MARGIN - _MIN_LINE_DIGITS * face.digit
        page = Page(dice, face, width - 2 * _MARGIN - dice.uniform(0, max(0, min(spare, 8))), dice.uniform(13, 17))
        try:
            questions = compose(page)
        except DoesNotFitError:
            continue
        if page.y <= _MAX_CONTENT_HEIGHT:
            return page, questions, width
    raise AssertionError(f"no {family} in {font} fits a page after {_ATTEMPTS} tries")


def _place_vertically(dice: Dice, page: Page) -> tuple[int, float]:
    """Returns the height of the page and the top of its content.

    A page is read as two tiles, cut at half its height, without a thumbnail. A line of text across the cut could not be
    read from the separate halves. The first of a few random positions without text on the cut is therefore used.
    """
    spare = min(24.0, _HEIGHTS[1] - 2 * _MARGIN - page.y)  # white space below the content, at most
    for _ in range(_PLACEMENT_ATTEMPTS):
        height = max(_HEIGHTS[0], math.floor(page.y + 2 * _MARGIN + dice.uniform(min(2.0, spare), spare)))
        top = dice.uniform(_MARGIN, max(_MARGIN, height - _MARGIN - page.y))
        cut = height / 2 - top
        if not any([run.baseline - page.face.cap_height - 1 < cut < run.baseline + 1 for run in page.runs]):
            break
    return height, top


def _place_glyphs(page: Page, origin: tuple[float, float], size: tuple[int, int], angle: float) -> list[Glyph]:
    """Returns the cells of the printed characters after rotating the page by `angle` degrees around its center."""
    pitches, cap_height = page.face.pitches, page.face.cap_height
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    middle_x, middle_y = size[0] / 2, size[1] / 2
    half_height = cap_height / 2
    glyphs = []
    for run in page.runs:
        x = origin[0] + run.x - middle_x
        y = round(origin[1] + run.baseline) - half_height - middle_y
        for character in run.text:
            pitch = pitches[character]
            if character != " ":
                half = pitch / 2
                # Image coordinates point down, so a counter-clockwise rotation has this sign.
                center_x = middle_x + cosine * (x + half) + sine * y
                center_y = middle_y - sine * (x + half) + cosine * y
                glyphs.append(
                    Glyph(character, center_x - half, center_y - half_height, center_x + half, center_y + half_height)
                )
            x += pitch
    return glyphs


def _is_inside(glyphs: list[Glyph], width: int, height: int) -> bool:
    """Returns whether all glyphs are on the page."""
    return (
        min([g.left for g in glyphs]) >= 0
        and min([g.top for g in glyphs]) >= 0
        and max([g.right for g in glyphs]) <= width
        and max([g.bottom for g in glyphs]) <= height
    )


def _choose(dice: Dice, questions: Questions) -> list[tuple[str, str]]:
    """Returns three or four questions, sometimes one of them reversed, each in one of its phrasings."""
    count = dice.integer(3, 4)
    direct, reverse = dice.shuffled(questions.direct), dice.shuffled(questions.reverse)
    num_reversed = 1 if reverse and dice.chance(_REVERSE_SHARE) else 0
    # A document with few direct questions gets more reversed ones.
    num_reversed = max(num_reversed, min(count - len(direct), len(reverse)))
    chosen = dice.shuffled(direct[: count - num_reversed] + reverse[:num_reversed])
    return [(dice.pick(phrasings), answer) for phrasings, answer in chosen]
