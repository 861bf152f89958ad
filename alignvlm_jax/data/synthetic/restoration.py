"""Pages on which the print of an answer is partly covered, after VCR (arXiv 2406.06462): to be read off what is left.

A document of the corpus gets the answer to one of its own questions struck through, glyph by glyph, by bars of the
paper's colour:

    easy   an eighth of a capital's height, its middle: one px, and people read on
    hard   a quarter of it: two px or three of some eight, and people guess

The question is the document's, so that what is to be restored is found as ever, by its label: what is asked for anew is
to read it. Every document comes twice, easy and then hard, with the same print covered: `source` of the record says
which it is. `evaluation.metrics.vcr_scores` scores it.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import ImageDraw

from alignvlm_jax.data.synthetic.corpus import write_corpus
from alignvlm_jax.data.synthetic.dice import Dice
from alignvlm_jax.data.synthetic.document import Document, Glyph, draw_document
from alignvlm_jax.data.synthetic.records import to_record
from alignvlm_jax.data.synthetic.values import SPLITS

Difficulty = Literal["easy", "hard"]

COVERED = {"easy": 1 / 8, "hard": 1 / 4}
"""Share of a capital's height that the bar takes."""

# Charts print marks, not lines.
_FAMILIES = ("receipt", "form", "table")


def draw_restoration(seed: int, split: str, index: int, difficulty: Difficulty) -> tuple[Document, str, str]:
    """A document with covered print, the question and its answer: a pure function of its arguments."""
    dice = Dice(seed, SPLITS.index(split), index, len(SPLITS))  # a stream of its own beside the document's
    document = draw_document(seed, split, index, family=dice.pick(_FAMILIES))
    places = [(len(printed), question, answer, printed) for question, answer, printed in _printed(document)]
    fewest = min(count for count, *_ in places)  # once, as a rule: what stands twice is covered twice
    _, question, answer, printed = dice.pick([place for place in places if place[0] == fewest])
    _cover(document, [glyph for glyphs in printed for glyph in glyphs], COVERED[difficulty])
    return document, question, answer


def _printed(document: Document) -> list[tuple[str, str, list[list[Glyph]]]]:
    """The questions whose answers are on the page, with the glyphs of the answer wherever it is."""
    glyphs_by_line, found = glyphs_of_lines(document), []
    for question, answer in zip(document.questions, document.answers, strict=True):
        printed = []
        for line, glyphs in zip(document.lines, glyphs_by_line, strict=True):
            start = line.find(answer)
            while start >= 0:
                before = len(line[:start].replace(" ", ""))
                printed.append(glyphs[before : before + len(answer.replace(" ", ""))])
                start = line.find(answer, start + 1)
        if printed:
            found.append((question, answer, printed))
    return found


def draw_restoration_records(seed: int, split: str, start: int, stop: int) -> list[dict[str, Any]]:
    """Records `start` to `stop - 1` of a split: 2i is document i easy, 2i + 1 the same one hard."""
    records = []
    for number in range(start, stop):
        difficulty = ("easy", "hard")[number % 2]
        document, question, answer = draw_restoration(seed, split, number // 2, difficulty)
        fields = {"source": difficulty, "questions": [question], "answers": [answer]}
        records.append(to_record(document) | fields | {"id": f"{document.id}-{difficulty}"})
    return records


def build_restoration_corpus(folder: str | Path, *, seed: int, sizes: Mapping[str, int], progress: bool = True) -> Path:
    """A data set of so many records a split, for `store.open_dataset(folder, split)`; kept if it is there already."""
    recipe = {"kind": "restoration", "seed": seed, "sizes": dict(sizes), "covered": COVERED}
    drawings = {
        split: (functools.partial(draw_restoration_records, seed, split), size) for split, size in sizes.items()
    }
    return write_corpus(folder, recipe, drawings, description=__doc__, progress=progress)


def glyphs_of_lines(document: Document) -> list[list[Glyph]]:
    """The glyphs of each line: a document has both in reading order, spaces left out of the glyphs."""
    glyphs, lines = iter(document.glyphs), []
    for line in document.lines:
        lines.append([next(glyphs) for character in line if character != " "])
        if "".join(glyph.char for glyph in lines[-1]) != line.replace(" ", ""):
            raise ValueError(f"{document.id}: its glyphs are not in the order of its lines")
    return lines


def _cover(document: Document, glyphs: list[Glyph], share: float) -> None:
    """Draws the bars over the picture. The paper's colour is the commonest: most of a page is paper."""
    image = document.image
    _, paper = max(image.getcolors(image.width * image.height))
    draw = ImageDraw.Draw(image)
    for glyph in glyphs:
        middle, half = (glyph.top + glyph.bottom) / 2, share * (glyph.bottom - glyph.top) / 2
        top, bottom = round(middle - half), round(middle + half) - 1
        draw.rectangle((round(glyph.left), top, round(glyph.right), max(bottom, top)), fill=paper)
