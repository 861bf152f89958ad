"""Pages on which the text of an answer is partly covered, after VCR (arXiv 2406.06462): a test of reading the rest.

In a document of the corpus, the answer to one of its own questions is struck through, glyph by glyph, with bars of the
page's color:

    easy   the middle eighth of a capital's height: one px, and people still read it
    hard   a quarter of it: two or three px of about eight, and people guess

The question is one of the document's questions, so the answer is still found by its label; only reading it is harder.
Every document comes twice, first easy and then hard, with the same text covered; the record's `source` is the
difficulty. `evaluation.metrics.vcr_scores` scores the answers.
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
"""Share of a capital's height that the bar covers."""

# Charts are excluded: they label single marks instead of printing lines of text.
_FAMILIES = ("receipt", "form", "table")


def draw_restoration(seed: int, split: str, index: int, difficulty: Difficulty) -> tuple[Document, str, str]:
    """Returns a document with covered text, the question and its answer. A pure function of its arguments."""
    # A separate random stream, so that drawing from it does not change the document.
    dice = Dice(seed, SPLITS.index(split), index, len(SPLITS))
    document = draw_document(seed, split, index, family=dice.pick(_FAMILIES))
    candidates = [
        (len(printed), question, answer, printed) for question, answer, printed in _find_printed_answers(document)
    ]
    # Usually an answer is printed once. If all are printed more often, every copy is covered.
    fewest = min(count for count, *_ in candidates)
    _, question, answer, printed = dice.pick([candidate for candidate in candidates if candidate[0] == fewest])
    _cover(document, [glyph for glyphs in printed for glyph in glyphs], COVERED[difficulty])
    return document, question, answer


def _find_printed_answers(document: Document) -> list[tuple[str, str, list[list[Glyph]]]]:
    """Returns the questions whose answers are printed, with the glyphs of each copy of the answer."""
    line_glyphs, printed_answers = glyphs_by_line(document), []
    for question, answer in zip(document.questions, document.answers, strict=True):
        printed = []
        for line, glyphs in zip(document.lines, line_glyphs, strict=True):
            start = line.find(answer)
            while start >= 0:
                # Glyphs do not include spaces, so the text is indexed without them.
                before = len(line[:start].replace(" ", ""))
                printed.append(glyphs[before : before + len(answer.replace(" ", ""))])
                start = line.find(answer, start + 1)
        if printed:
            printed_answers.append((question, answer, printed))
    return printed_answers


def draw_restoration_records(seed: int, split: str, start: int, stop: int) -> list[dict[str, Any]]:
    """Returns records `start` to `stop - 1` of a split: 2i is document i easy, 2i + 1 the same document hard."""
    records = []
    for number in range(start, stop):
        difficulty = ("easy", "hard")[number % 2]
        document, question, answer = draw_restoration(seed, split, number // 2, difficulty)
        fields = {"source": difficulty, "questions": [question], "answers": [answer]}
        records.append(to_record(document) | fields | {"id": f"{document.id}-{difficulty}"})
    return records


def build_restoration_corpus(folder: str | Path, *, seed: int, sizes: Mapping[str, int], progress: bool = True) -> Path:
    """Writes a data set of these records, for `store.open_dataset(folder, split)`, unless it exists.

    Args:
      folder: folder of the data set.
      seed: seed of the documents.
      sizes: number of records of each split.
      progress: whether to show a progress bar.
    """
    recipe = {"kind": "restoration", "seed": seed, "sizes": dict(sizes), "covered": COVERED}
    drawings = {
        split: (functools.partial(draw_restoration_records, seed, split), size) for split, size in sizes.items()
    }
    return write_corpus(folder, recipe, drawings, description=__doc__, progress=progress)


def glyphs_by_line(document: Document) -> list[list[Glyph]]:
    """Returns the glyphs of each line; both are in reading order, and spaces have no glyphs."""
    glyphs, lines = iter(document.glyphs), []
    for line in document.lines:
        lines.append([next(glyphs) for character in line if character != " "])
        if "".join(glyph.char for glyph in lines[-1]) != line.replace(" ", ""):
            raise ValueError(f"{document.id}: the glyphs are not in the order of the lines")
    return lines


def _cover(document: Document, glyphs: list[Glyph], share: float) -> None:
    """Draws the bars over the image."""
    # The most frequent color is the paper's: most of a page is paper.
    image = document.image
    _, paper = max(image.getcolors(image.width * image.height))
    draw = ImageDraw.Draw(image)
    for glyph in glyphs:
        middle, half = (glyph.top + glyph.bottom) / 2, share * (glyph.bottom - glyph.top) / 2
        top, bottom = round(middle - half), round(middle + half) - 1
        draw.rectangle((round(glyph.left), top, round(glyph.right), max(bottom, top)), fill=paper)
