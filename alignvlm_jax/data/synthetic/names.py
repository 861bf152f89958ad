"""Documents about people and places with names from a fixed lexicon, to measure how rarity alone affects reading.

A lexicon consists of groups of six names of one pattern. The six names of a group are printed on 0, 1, 4, 16, 64 and
256 training pages, assigned at random, so that names of different rarity differ in nothing else:

    look-alikes   LANOR  TANOR  KANOR  SANOR  VANOR  RANOR     any two differ in one letter
    loners        DIKUBE  SOLARI  ...                          three edits or more from every other name
    printed          16      0    256      1      4     64

No ordinary training document prints any of these names (`values.split_of` puts them in "validation"). The counts
therefore also hold if both corpora are mixed, and ordinary held-out values stay held out. A page is a form with three
names of three groups and asks for all of them. Held-out and validation pages print every name equally often.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data import store
from alignvlm_jax.data.edit_distance import edit_distance
from alignvlm_jax.data.synthetic.corpus import write_corpus
from alignvlm_jax.data.synthetic.dice import Dice
from alignvlm_jax.data.synthetic.document import Document, print_document
from alignvlm_jax.data.synthetic.families import Questions, form
from alignvlm_jax.data.synthetic.fonts import TRAINING_FONTS, Face
from alignvlm_jax.data.synthetic.layout import Page
from alignvlm_jax.data.synthetic.records import to_record
from alignvlm_jax.data.synthetic.values import (
    CONSONANTS,
    NAME_PATTERNS,
    SPLITS,
    DoesNotFitError,
    Values,
    spell_name,
    split_of,
)
from alignvlm_jax.errors import UserError

COUNTS = (0, 1, 4, 16, 64, 256)
"""Numbers of training pages that print a name. Each group has one name for each number."""

LOOK_ALIKE = 2
"""Names at most this many edits apart look alike."""

FAMILY = "names"
_KIND = "synthetic names"
_NAMES_PER_PAGE = 3
_PAGES_PER_NAME = {"validation": 4, "heldout": 12}  # number of pages that print each name
_PATTERNS = (*NAME_PATTERNS[5], *NAME_PATTERNS[6])
_STREAM = 3  # key of the random stream; the ordinary documents use 0, 1 and 2, one per split


@dataclasses.dataclass(frozen=True)
class Name:
    """A word of the lexicon.

    Attributes:
      text: the name, in capitals.
      group: number of its group of six; the rarity within a group is random.
      has_look_alikes: whether the other names of its group look like it. If not, no name of the lexicon does.
      seen: number of training pages that print it, once each.
    """

    text: str
    group: int
    has_look_alikes: bool
    seen: int


@functools.cache
def draw_lexicon(seed: int, groups: int = 24) -> tuple[Name, ...]:
    """Returns groups of six names. The first half of the groups are look-alikes, and the others are loners.

    Args:
      seed: seed of all random choices, including the rarities.
      groups: number of groups, a multiple of six.

    Raises:
      UserError: if `groups` is not a positive multiple of six.
    """
    if groups < 6 or groups % 6:
        raise UserError(f"groups: expected a multiple of 6, got {groups}")
    dice = Dice(seed, _STREAM)
    names: list[Name] = []
    for group in range(groups):
        alike = group < groups // 2
        texts = _look_alikes(dice, names) if alike else _loners(dice, names)
        # The shuffle assigns the rarities.
        names += [Name(text, group, alike, seen) for text, seen in zip(dice.shuffled(texts), COUNTS, strict=True)]
    return tuple(names)


def draw_names_document(seed: int, split: str, index: int, *, groups: int = 24, render: bool = True) -> Document:
    """Returns document `index` of a split, a pure function of its arguments; `render` adds the image."""
    names = _deal_names(seed, groups, split)[index]
    dice = Dice(seed, _STREAM, SPLITS.index(split), index)
    labels = dice.shuffled(form.NAME_LABELS)[:_NAMES_PER_PAGE]
    if dice.chance(0.5):
        labels.append(dice.pick(form.OTHER_LABELS))
    labels = dice.shuffled(labels)

    def compose(page: Page) -> Questions:
        return form.compose(page, _GivenNames(dice, split, names), labels)

    identity, font = f"names-{seed}-{split}-{index}", dice.pick(TRAINING_FONTS)
    return print_document(dice, compose, _ask_all, id=identity, family=FAMILY, font=font, render=render)


def num_documents(split: str, groups: int = 24) -> int:
    """Returns the number of pages of a split."""
    return groups * (sum(COUNTS) if split == "train" else len(COUNTS) * _PAGES_PER_NAME[split]) // _NAMES_PER_PAGE


def build_names_corpus(
    folder: str | Path,
    *,
    seed: int = 0,
    groups: int = 24,
    splits: Sequence[str] = SPLITS,
    progress: bool = True,
    processes: int | None = None,
) -> Path:
    """Writes splits of the corpus to a folder, for `store.open_dataset`. Keeps an existing corpus.

    Args:
      folder: folder of the data set.
      seed: seed of the lexicon and of the pages.
      groups: number of groups of names, a multiple of six; 24 give 2,728 training, 192 validation and 576 held-out
        pages.
      splits: splits to draw.
      progress: whether to show a progress bar.
      processes: number of drawing processes; None uses one per CPU core, and fewer for a small corpus.
    """
    lexicon = draw_lexicon(seed, groups)
    recipe = {
        "kind": _KIND,
        "seed": seed,
        "groups": groups,
        "splits": list(splits),
        "names": [dataclasses.asdict(name) for name in lexicon],
        "drawing": _fingerprint(seed, groups),
    }
    drawings = {
        split: (functools.partial(_draw_records, seed, groups, split), num_documents(split, groups)) for split in splits
    }
    return write_corpus(folder, recipe, drawings, description=__doc__, progress=progress, processes=processes)


def read_lexicon(folder: str | Path) -> tuple[Name, ...]:
    """Returns the lexicon of a corpus on disk.

    Raises:
      UserError: if the folder holds another kind of data set.
    """
    recipe = store.read_metadata(folder)
    if recipe.get("kind") != _KIND:
        raise UserError(
            f"{folder} holds no corpus of names: draw one with "
            "alignvlm_jax.data.synthetic.names.build_names_corpus(folder)"
        )
    return tuple([Name(**name) for name in recipe["names"]])


def redraw(document_id: str, groups: int) -> Document:
    """Returns the document with this id, with its glyphs but without its image."""
    _, seed, split, index = document_id.split("-")
    return draw_names_document(int(seed), split, int(index), groups=groups, render=False)


class _GivenNames(Values):
    """Values of a split, except that names are taken from a given sequence."""

    def __init__(self, dice: Dice, split: str, names: Iterable[str]):
        super().__init__(dice, split)
        self._names = iter(names)

    def name(self, shortest: int, longest: int, face: Face, room: float) -> str:
        """Returns the next name, which may have any length.

        Raises:
          DoesNotFitError: if the name is wider than `room`.
        """
        name = next(self._names)
        if face.width(name) > room:
            raise DoesNotFitError
        return name


def _look_alikes(dice: Dice, others: list[Name]) -> list[str]:
    """Returns six names that differ in one consonant."""
    while True:
        pattern = dice.pick(_PATTERNS)
        stem = spell_name(dice, pattern)
        place = dice.pick([i for i, letter in enumerate(pattern) if letter == "C"])
        # All names that differ from the stem in this consonant, except names of other splits.
        texts = [stem[:place] + letter + stem[place + 1 :] for letter in CONSONANTS]
        texts = [text for text in texts if split_of(text) == "validation"]
        if len(texts) >= len(COUNTS) and not any(_is_too_similar(text, others) for text in texts):
            return dice.shuffled(texts)[: len(COUNTS)]


def _loners(dice: Dice, others: list[Name]) -> list[str]:
    """Returns six names of one pattern, unlike each other and all others."""
    pattern = dice.pick(_PATTERNS)
    texts: list[str] = []
    while len(texts) < len(COUNTS):
        text = spell_name(dice, pattern)
        if split_of(text) == "validation" and not _is_too_similar(text, others):
            if all(edit_distance(text, other) > LOOK_ALIKE for other in texts):
                texts.append(text)
    return texts


def _is_too_similar(text: str, others: list[Name]) -> bool:
    """Returns whether a text looks like one of the other names."""
    return any(edit_distance(text, other.text) <= LOOK_ALIKE for other in others)


@functools.cache
def _deal_names(seed: int, groups: int, split: str) -> tuple[tuple[str, ...], ...]:
    """Returns the names of each page of a split. No page has two names of one group.

    The groups are divided into columns, one for each name on a page. Every column is shuffled, and page i has the names
    in row i.
    """
    dice = Dice(seed, _STREAM, SPLITS.index(split))
    order = dice.shuffled(range(groups))
    columns: list[list[str]] = [[] for _ in range(_NAMES_PER_PAGE)]
    for name in draw_lexicon(seed, groups):
        times = name.seen if split == "train" else _PAGES_PER_NAME[split]
        # Groups of one column never share a page.
        columns[order[name.group] % _NAMES_PER_PAGE] += [name.text] * times
    rows = zip(*[dice.shuffled(column) for column in columns], strict=True)
    return tuple([tuple(dice.shuffled(row)) for row in rows])


def _ask_all(dice: Dice, questions: Questions) -> list[tuple[str, str]]:
    """Returns all questions in random order, each in one of its phrasings."""
    return [(dice.pick(phrasings), answer) for phrasings, answer in dice.shuffled(questions.direct)]


def _draw_records(seed: int, groups: int, split: str, start: int, stop: int) -> list[dict[str, Any]]:
    """Returns the records of documents `start` to `stop - 1` of a split."""
    return [to_record(draw_names_document(seed, split, index, groups=groups)) for index in range(start, stop)]


def _fingerprint(seed: int, groups: int) -> str:
    """Returns a hash of the first documents, so that a change of the drawing code replaces an existing corpus."""
    digest = hashlib.sha256()
    for index in range(8):
        document = draw_names_document(seed, "train", index, groups=groups, render=False)
        digest.update(repr((document.font, document.transcription, document.questions)).encode())
    return digest.hexdigest()[:16]
