"""Shows one held-out page: its questions, the answers, and the words that its patches become."""

import pathlib

import PIL.Image

from alignvlm_jax.data import images
from alignvlm_jax.demo.output import show
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.report import Report
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inspector.words import patch_words
from alignvlm_jax.models.connectors import AlignConfig

_ENLARGEMENT = 5
_COLUMN_WIDTH = 4  # characters per patch, including one space


def show_example(reader: Reader, record: runner.Record, report: Report, out: pathlib.Path) -> str:
    """Saves the page, prints its questions and answers, and returns one of the questions."""
    image = images.open_image(record["image"])
    image.save(out / "example.png")
    enlarged = (image.width * _ENLARGEMENT, image.height * _ENLARGEMENT)
    image.resize(enlarged, PIL.Image.Resampling.BICUBIC).save(out / "example_large.png")
    show(f"{record['id']}, a {record['source']}: {out / 'example.png'}, enlarged in {out / 'example_large.png'}\n")
    answers = [answer for answer in report.answers if answer.document == record["id"]]
    for answer in answers:
        verdict = "right" if answer.is_right else f"wrong: the page says {answer.expected}"
        show(f"  {answer.question}  ->  {answer.predicted}   ({verdict})")
    if isinstance(reader.config.connector, AlignConfig):
        show("\nThe most likely word of each patch in ALIGN's distribution (· for none):\n")
        for tile in _patch_words(reader, image):
            for row in tile:
                if any(row):
                    cells = [f"{word[: _COLUMN_WIDTH - 1] or '·':<{_COLUMN_WIDTH}}" for word in row]
                    show("  " + "".join(cells).rstrip())
    return answers[0].question


def _patch_words(reader: Reader, image: PIL.Image.Image) -> list[list[list[str]]]:
    """Returns the word with the largest probability in ALIGN's distribution, by tile, row and column of patches."""
    # The words depend only on the page, so the question does not matter.
    prompt = reader.prompts(image, ["?"])[0]
    variables = reader.generator.variables
    words = patch_words(reader.config, variables, prompt.tiles, prompt.tile_valid_hw, k=1, progress=False)
    side = reader.config.vision.grid_size
    grids = words.ids.reshape(-1, side, side)
    return [[[reader.tokenizer.decode([token]).strip() for token in row] for row in grid] for grid in grids]
