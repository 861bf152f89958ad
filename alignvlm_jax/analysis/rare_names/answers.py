"""Three ways to obtain the names on a page: from the model, from its decoder alone, and from its visual tokens.

    ask_names      asks the model
    ask_decoder    asks the decoder, with the embeddings of the letters in place of the visual tokens; errors that occur
                   here are errors of the decoder
    read_letters   finds the letter nearest to the visual tokens, at the one glyph in which look-alikes differ; this is
                   what the connector reports, regardless of the decoder's answer

Axes: B pages, T visual tokens of a page, D decoder width.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from alignvlm_jax.analysis.rare_names.kinds import NameAnswer, classify, distinguishing_letters
from alignvlm_jax.data import images, store
from alignvlm_jax.data.synthetic import Document
from alignvlm_jax.data.synthetic.names import read_lexicon, redraw
from alignvlm_jax.data.tiling import plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.report import Answer
from alignvlm_jax.inference.generate import Prompt, pad_prompts
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM, tokens_per_tile
from alignvlm_jax.pretraining.patches import CHARACTERS, patch_classes
from alignvlm_jax.progress import progress_bar

_PAGES_PER_BATCH = 32
_MAX_NEW_TOKENS = 16


def ask_names(
    reader: Reader, folder: str | Path, *, split: str = "heldout", limit: int | None = None
) -> list[NameAnswer]:
    """Returns the reader's answers to the questions that ask for names.

    Args:
      reader: the model.
      folder: folder of a names corpus.
      split: split of the pages.
      limit: if set, only the first `limit` questions are asked.
    """
    lexicon, records = read_lexicon(folder), store.open_dataset(folder, split)
    report = runner.evaluate(reader, records, limit=limit, max_new_tokens=_MAX_NEW_TOKENS, title="names")
    return classify(report.answers, lexicon)


def ask_decoder(
    reader: Reader, folder: str | Path, *, split: str = "heldout", limit: int | None = None
) -> list[NameAnswer]:
    """Returns the decoder's answers when each visual token is the embedding of the letter on its patch, or of a space.

    The nano decoder was pre-trained on such input (`pretraining/language_recipe.py`); other decoders may fail on it.
    Takes the arguments of `ask_names`.

    Raises:
      UserError: if the model does not have one visual token per patch.
    """
    _check_one_token_per_patch(reader)
    lexicon = read_lexicon(folder)
    # Token of each class of patches. Class 0 means no character and is spelled as a space.
    spelling = np.array([reader.tokenizer.encode_text(letter)[0] for letter in " " + CHARACTERS], np.int32)
    vision = reader.config.vision
    answers: list[Answer] = []
    for pages in _batches(folder, split, "names, spelled"):
        prompts, questions = [], []
        for record, document in pages:
            plan = plan_tiles(*document.size, reader.tiling)
            classes = patch_classes(document, plan, vision.image_size, vision.patch_size).reshape(-1)
            page_prompts = reader.prompts(images.open_image(record["image"]), record["questions"])
            prompts += [_spell(prompt, spelling[classes]) for prompt in page_prompts]
            page_fields = record["id"], record["source"], record["font"]
            questions += [(*page_fields, *pair) for pair in zip(record["questions"], record["answers"], strict=True)]
        predicted = reader.answer(prompts, max_new_tokens=_MAX_NEW_TOKENS)
        answers += [Answer(*fields, answer) for fields, answer in zip(questions, predicted, strict=True)]
        if limit is not None and len(answers) >= limit:
            break
    return classify(answers[:limit], lexicon)


def read_letters(reader: Reader, folder: str | Path, answers: Sequence[NameAnswer]) -> list[NameAnswer]:
    """Returns the answers with `letter` set for the names that have look-alikes.

    The visual tokens of the patches under the distinguishing glyph are compared with the embeddings of the letters in
    which the names of the group differ. They are compared by cosine similarity, after the mean embedding is subtracted
    from both, and the closest pair of token and letter decides.

    Raises:
      UserError: if the model does not have one visual token per patch.
    """
    _check_one_token_per_patch(reader)
    letters = distinguishing_letters(read_lexicon(folder))
    embedding = np.asarray(reader.generator.variables["params"]["language"]["embedding"], np.float32)
    mean = embedding.mean(axis=0)
    # Indices of the answers to read, by page, so that each page is encoded once.
    answers_of_page = collections.defaultdict(list)
    for number, answer in enumerate(answers):
        if answer.name.group in letters:
            answers_of_page[answer.document].append(number)

    read = list(answers)
    # The id of a page has the form FAMILY-SEED-SPLIT-INDEX.
    _, _, split, _ = answers[0].document.split("-")
    indices = [int(page.split("-")[3]) for page in answers_of_page]
    for pages in _batches(folder, split, "names, letters", indices):
        prompts = [reader.prompts(images.open_image(record["image"]), ["?"])[0] for record, _ in pages]
        for (record, document), tokens in zip(pages, _visual_tokens(reader, prompts), strict=True):
            for number in answers_of_page[record["id"]]:
                name = answers[number].name
                # Subtracting the mean removes what all embeddings share, which would dominate the cosine.
                position, choices = letters[name.group]
                choice_rows = embedding[[reader.tokenizer.encode_text(letter)[0] for letter in choices]] - mean
                token_rows = tokens[_patches_of_letter(reader, document, name.text, position)] - mean
                lengths = np.linalg.norm(token_rows, axis=1)[:, None] * np.linalg.norm(choice_rows, axis=1)
                # [patches, letters]: the letter with the highest similarity at any patch wins.
                cosine = (token_rows @ choice_rows.T) / lengths
                read[number] = dataclasses.replace(read[number], letter=choices[int(cosine.max(axis=0).argmax())])
    return read


def has_one_token_per_patch(reader: Reader) -> bool:
    """Returns True if every patch has a visual token of its own, as `ask_decoder` and `read_letters` require."""
    return tokens_per_tile(reader.config) == reader.config.vision.num_patches and not reader.config.newline


def _check_one_token_per_patch(reader: Reader) -> None:
    if not has_one_token_per_patch(reader):
        raise UserError(
            "this model does not have one visual token for each patch: its patches cannot be read one by one"
        )


def _batches(
    folder: str | Path, split: str, title: str, indices: Sequence[int] | None = None
) -> Iterator[list[tuple[runner.Record, Document]]]:
    """Yields records in batches, each with its document drawn again for the positions of the glyphs."""
    records, groups = store.open_dataset(folder, split), store.read_metadata(folder)["groups"]
    order = range(len(records)) if indices is None else indices
    with progress_bar(desc=title, total=len(order), unit="page", leave=None) as progress:
        for start in range(0, len(order), _PAGES_PER_BATCH):
            batch = [records[index] for index in order[start : start + _PAGES_PER_BATCH]]
            yield [(record, redraw(record["id"], groups)) for record in batch]
            progress.update(len(batch))


def _spell(prompt: Prompt, letters: Int[np.ndarray, " T"]) -> Prompt:
    """Returns the prompt with text tokens in place of its visual tokens."""
    is_visual = prompt.visual_index >= 0
    # The maximum keeps text, whose index is -1, a valid index. `where` then selects the text's own token.
    tokens = np.where(is_visual, letters[np.maximum(prompt.visual_index, 0)], prompt.tokens)
    return Prompt(tokens, np.full_like(prompt.visual_index, -1), prompt.tiles[:0], prompt.tile_valid_hw[:0])


def _patches_of_letter(reader: Reader, document: Document, name: str, position: int) -> Int[np.ndarray, " n"]:
    """Returns the indices of the visual tokens under a letter of a printed name, the letter's edges excluded."""
    start = "".join([glyph.char for glyph in document.glyphs]).index(name)
    glyph = document.glyphs[start + position]
    plan, patch = plan_tiles(*document.size, reader.tiling), reader.config.vision.patch_size
    # Take three points across the middle of the glyph, in pixels of the page, and map them into their tiles.
    x = glyph.left + (glyph.right - glyph.left) * np.array([0.25, 0.5, 0.75])
    tiles, points = plan.map_points(np.stack([x, np.full(3, (glyph.top + glyph.bottom) / 2)], axis=1))
    grid = reader.config.vision.grid_size
    column, row = np.clip(points // patch, 0, grid - 1).astype(int).T
    return np.unique((tiles * grid + row) * grid + column)


def _visual_tokens(reader: Reader, prompts: Sequence[Prompt]) -> Float[np.ndarray, "B T D"]:
    # The number of rows is fixed, so that the last, shorter batch does not compile another program.
    batch = pad_prompts(
        prompts, rows=_PAGES_PER_BATCH, tile_size=reader.config.vision.image_size, pad_id=reader.generator.pad_id
    )
    variables = reader.generator.variables
    tokens = _encode(AlignVLM(reader.config), variables, batch["tiles"], batch["tile_valid_hw"])
    return np.asarray(tokens, np.float32)[: len(prompts)]


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: AlignVLM, variables, tiles, tile_valid_hw):
    return model.apply(variables, tiles, tile_valid_hw, method="encode_images")[0]
