"""Asking for names, three ways: of the model, of its decoder alone, and of the visual tokens.

    ask_names      the model's own answers
    ask_decoder    the decoder's, with the letters' own embeddings in the place of the visual tokens: what goes wrong
                   here goes wrong in the decoder
    read_letters   which letter the visual tokens are nearest to at the one glyph by which look-alikes differ: what the
                   connector says, whatever the decoder answers

Axes: T visual tokens of a page, D decoder width. The corpus is that of `data/synthetic/names.py`.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from alignvlm_jax.data import images, store
from alignvlm_jax.data.edit_distance import edit_distance
from alignvlm_jax.data.synthetic import Document
from alignvlm_jax.data.synthetic.names import LOOK_ALIKE, Name, read_lexicon, redraw
from alignvlm_jax.data.tiling import plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.report import Answer
from alignvlm_jax.inference.generate import Prompt, pad_prompts
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM, tokens_per_tile
from alignvlm_jax.pretraining.patches import CHARACTERS, patch_classes

KINDS = (
    "right",
    "commoner look-alike",
    "rarer look-alike",
    "elsewhere on the page",
    "another name",
    "commoner ending",
    "rarer ending",
    "garble",
)
"""What an answer is. The last three are no name of the corpus; the two before "garble" end as some other name does,
whatever they begin with."""

_ENDING = 3  # letters, at least
_PAGES_AT_ONCE = 32
_MAX_NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class NameAnswer:
    """An answer to a question for a name of the lexicon.

    Attributes:
      document: id of the page.
      name: the one asked for.
      predicted: the answer.
      kind: one of `KINDS`.
      letter: for names with look-alikes, which of the letters that tell the group's names apart the visual tokens are
        nearest to; None where nobody looked.
    """

    document: str
    name: Name
    predicted: str
    kind: str
    letter: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "NameAnswer":
        return cls(**{**fields, "name": Name(**fields["name"])})


def ask_names(
    reader: Reader, folder: str | Path, *, split: str = "heldout", limit: int | None = None
) -> list[NameAnswer]:
    """The reader's answers to the questions for names.

    Args:
      reader: the model.
      folder: of a names corpus.
      split: which pages.
      limit: ask only the first so many questions.
    """
    lexicon, records = read_lexicon(folder), store.open_dataset(folder, split)
    report = runner.evaluate(reader, records, limit=limit, max_new_tokens=_MAX_NEW_TOKENS, title="names")
    return judge(report.answers, lexicon)


def ask_decoder(
    reader: Reader, folder: str | Path, *, split: str = "heldout", limit: int | None = None
) -> list[NameAnswer]:
    """The decoder's answers where each patch is the embedding of the letter that lies there, or of a space.

    So the nano decoder was pre-trained (`pretraining/language_recipe.py`); another may make little of it.
    """
    _check_one_token_a_patch(reader)
    lexicon = read_lexicon(folder)
    spelling = np.array([reader.tokenizer.encode_text(letter)[0] for letter in " " + CHARACTERS], np.int32)
    vision = reader.config.vision
    answers: list[Answer] = []
    for records_at_once in _batches(folder, split, "names, spelled"):
        prompts, asked = [], []
        for record, document in records_at_once:
            plan = plan_tiles(*document.size, reader.tiling)
            classes = patch_classes(document, plan, vision.image_size, vision.patch_size).reshape(-1)
            seen = reader.prompts(images.open_image(record["image"]), record["questions"])
            prompts += [_spell(prompt, spelling[classes]) for prompt in seen]
            about = record["id"], record["source"], record["font"]
            asked += [(*about, *pair) for pair in zip(record["questions"], record["answers"], strict=True)]
        predicted = reader.answer(prompts, max_new_tokens=_MAX_NEW_TOKENS)
        answers += [Answer(*fields, answer) for fields, answer in zip(asked, predicted, strict=True)]
        if limit is not None and len(answers) >= limit:
            break
    return judge(answers[:limit], lexicon)


def read_letters(reader: Reader, folder: str | Path, answers: Sequence[NameAnswer]) -> list[NameAnswer]:
    """The answers, `letter` filled in for the names with look-alikes.

    The visual tokens of the patches that the glyph lies on are compared with the embeddings of the letters by which the
    group's names differ, by cosine after the mean embedding was taken from both; the nearest of all pairs counts.
    """
    _check_one_token_a_patch(reader)
    letters = telling_letters(read_lexicon(folder))
    embedding = np.asarray(reader.generator.variables["params"]["language"]["embedding"], np.float32)
    mean = embedding.mean(axis=0)
    of_page = collections.defaultdict(list)
    for number, answer in enumerate(answers):
        if answer.name.group in letters:
            of_page[answer.document].append(number)

    found = list(answers)
    _, _, split, _ = answers[0].document.split("-")
    wanted = [int(page.split("-")[3]) for page in of_page]
    for records_at_once in _batches(folder, split, "names, letters", wanted):
        prompts = [reader.prompts(images.open_image(record["image"]), ["?"])[0] for record, _ in records_at_once]
        for (record, document), tokens in zip(records_at_once, _visual_tokens(reader, prompts), strict=True):
            for number in of_page[record["id"]]:
                name = answers[number].name
                place, choices = letters[name.group]
                rows = embedding[[reader.tokenizer.encode_text(letter)[0] for letter in choices]] - mean
                seen = tokens[_patches_of_letter(reader, document, name.text, place)] - mean
                cosine = (seen @ rows.T) / np.linalg.norm(seen, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
                found[number] = dataclasses.replace(found[number], letter=choices[int(cosine.max(axis=0).argmax())])
    return found


def judge(answers: Sequence[Answer], lexicon: Sequence[Name]) -> list[NameAnswer]:
    """The answers to questions for names, each with what kind of answer it is; other questions are left out.

    Args:
      answers: about each page all of them, for it is from them that it is known what else is printed there.
      lexicon: of the corpus.
    """
    names, endings = {name.text: name for name in lexicon}, count_endings(lexicon)
    printed = collections.defaultdict(set)
    for answer in answers:
        printed[answer.document].add(answer.expected)
    judged = []
    for answer in answers:
        if answer.expected in names:
            name, predicted = names[answer.expected], answer.predicted.strip()
            kind = _kind(name, predicted, names, printed[answer.document])
            kind = kind_of_garble(name, predicted, endings) if kind == "garble" else kind
            judged.append(NameAnswer(answer.document, name, predicted, kind))
    return judged


def count_endings(lexicon: Iterable[Name]) -> collections.Counter[str]:
    """How many training pages print a name that ends so, for all endings of all names of the corpus."""
    counts: collections.Counter[str] = collections.Counter()
    for name in lexicon:
        counts.update({name.text[-length:]: name.seen for length in range(_ENDING, len(name.text) + 1)})
    return counts


def kind_of_garble(name: Name, predicted: str, endings: Mapping[str, int]) -> str:
    """Whether an answer that is no name ends as another name does, and as a commoner or a rarer one.

    The longest ending counts, against as many letters of the true name. Over names that are asked for equally often as
    many are commoner as are rarer if rarity does not matter.

    Args:
      name: the one asked for.
      predicted: the answer.
      endings: from `count_endings`.
    """
    length = max((n for n in range(_ENDING, len(predicted) + 1) if predicted[-n:] in endings), default=0)
    said, true = predicted[-length:], name.text[-length:]
    if not length or endings[said] == endings[true]:
        return "garble"
    return "commoner ending" if endings[said] > endings[true] else "rarer ending"


def telling_letters(lexicon: Iterable[Name]) -> dict[int, tuple[int, str]]:
    """For each group of look-alikes, the place at which its names differ, and the letters they have there."""
    groups = collections.defaultdict(list)
    for name in lexicon:
        if name.has_look_alikes:
            groups[name.group].append(name.text)
    letters = {}
    for group, texts in groups.items():
        place = next(i for i, column in enumerate(zip(*texts, strict=True)) if len(set(column)) > 1)
        letters[group] = place, "".join([text[place] for text in texts])
    return letters


def _kind(name: Name, predicted: str, names: Mapping[str, Name], printed: set[str]) -> str:
    if predicted == name.text:
        return "right"
    if predicted in printed:
        return "elsewhere on the page"
    other = names.get(predicted)
    if other is None:
        return "garble"
    if edit_distance(predicted, name.text) > LOOK_ALIKE:
        return "another name"
    return "commoner look-alike" if other.seen > name.seen else "rarer look-alike"


def _batches(
    folder: str | Path, split: str, title: str, wanted: Sequence[int] | None = None
) -> Iterator[list[tuple[runner.Record, Document]]]:
    """Records with their documents drawn again, for where their glyphs are."""
    records, groups = store.open_dataset(folder, split), store.read_metadata(folder)["groups"]
    order = range(len(records)) if wanted is None else wanted
    with tqdm(total=len(order), desc=title, unit="page", dynamic_ncols=True, leave=None) as progress:
        for start in range(0, len(order), _PAGES_AT_ONCE):
            chosen = [records[index] for index in order[start : start + _PAGES_AT_ONCE]]
            yield [(record, redraw(record["id"], groups)) for record in chosen]
            progress.update(len(chosen))


def has_one_token_a_patch(reader: Reader) -> bool:
    """Whether it can be told what a patch became: `ask_decoder` and `read_letters` need that."""
    return tokens_per_tile(reader.config) == reader.config.vision.num_patches and not reader.config.newline


def _check_one_token_a_patch(reader: Reader) -> None:
    if not has_one_token_a_patch(reader):
        raise UserError("this model has not one visual token for each patch: what a patch became cannot be told")


def _spell(prompt: Prompt, letters: Int[np.ndarray, " T"]) -> Prompt:
    """The prompt with tokens of text in the place of its visual tokens."""
    visual = prompt.visual_index >= 0
    tokens = np.where(visual, letters[np.maximum(prompt.visual_index, 0)], prompt.tokens)
    return Prompt(tokens, np.full_like(prompt.visual_index, -1), prompt.tiles[:0], prompt.tile_valid_hw[:0])


def _patches_of_letter(reader: Reader, document: Document, name: str, place: int) -> Int[np.ndarray, " n"]:
    """The visual tokens of the patches that a letter of a printed name lies on, but for its edges."""
    start = "".join([glyph.char for glyph in document.glyphs]).index(name)
    glyph = document.glyphs[start + place]
    plan, patch = plan_tiles(*document.size, reader.tiling), reader.config.vision.patch_size
    x = glyph.left + (glyph.right - glyph.left) * np.array([0.25, 0.5, 0.75])
    tiles, points = plan.map_points(np.stack([x, np.full(3, (glyph.top + glyph.bottom) / 2)], axis=1))
    grid = reader.config.vision.grid_size
    column, row = np.clip(points // patch, 0, grid - 1).astype(int).T
    return np.unique((tiles * grid + row) * grid + column)


def _visual_tokens(reader: Reader, prompts: Sequence[Prompt]) -> Float[np.ndarray, "B T D"]:
    batch = pad_prompts(
        prompts, rows=_PAGES_AT_ONCE, tile_size=reader.config.vision.image_size, pad_id=reader.generator.pad_id
    )
    variables = reader.generator.variables
    tokens = _encode(AlignVLM(reader.config), variables, batch["tiles"], batch["tile_valid_hw"])
    return np.asarray(tokens, np.float32)[: len(prompts)]


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: AlignVLM, variables, tiles, tile_valid_hw):
    return model.apply(variables, tiles, tile_valid_hw, method="encode_images")[0]
