"""GQA's balanced test-dev questions: what is where in a photograph.

    testdev_balanced_questions.json             {"201307251": {"imageId": "n161313", "question": "Is it overcast?",
    images/n161313.jpg                            "answer": "no", "fullAnswer": "No, it is clear.", ...}}

In Parquet (lmms-lab/GQA): testdev_balanced_instructions/testdev-*.parquet with id, imageId, question, answer, and
testdev_balanced_images/testdev-*.parquet with id, image. Source: cs.stanford.edu/people/dorarad/gqa.
"""

import functools
import pathlib
from collections.abc import Iterable, Mapping

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout
from alignvlm_jax.evaluation.benchmarks.question import Cell, Question


def _read_original(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    name = "testdev_balanced_questions.json" if split == "test" else f"{split}_balanced_questions.json"
    found = files.find(folder, name, f"*/{name}")
    if not found:
        return None
    content = files.json_file(found[0])
    if not isinstance(content, dict):
        raise UserError(f"{found[0]}: GQA's files have an object with a name for each question")
    places = [found[0].parent / "images", folder / "images"]
    images = next((place for place in places if place.is_dir()), places[0])
    rows = (
        ({"id": id, **entry} if isinstance(entry, dict) else entry, f"{found[0]}: {id}")
        for id, entry in content.items()
    )
    return files.questions(rows, lambda row: _question(row, images / f"{row.text('imageId')}.jpg"))


def _read_parquet(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    found = files.find(folder, "testdev_balanced_instructions/testdev-*.parquet")
    if split != "test" or not found:
        return None
    shown: dict[str, Cell] = {}
    for file in files.find(folder, "testdev_balanced_images/testdev-*.parquet"):
        shown |= {fields.get("id"): fields.get("image") for fields, _ in files.parquet_rows(file, ("image",))}
    if not shown:
        raise UserError(f"{folder}: the images of GQA are not there ({PARQUET.expected})")
    rows = (row for file in found for row in files.parquet_rows(file, ()))
    return files.questions(rows, functools.partial(_of_parquet, shown))


def _of_parquet(shown: Mapping[str, Cell], row: Row) -> Question:
    image = row.text("imageId")
    if image not in shown:
        raise UserError(f"{row.where}: there is no image {image!r}")
    return _question(row, shown[image])


def _question(row: Row, image: pathlib.Path | Cell) -> Question:
    return Question(
        id=row.text("id"), where=row.where, text=row.text("question"), images=(image,), references=(row.text("answer"),)
    )


ORIGINAL = Layout("the authors'", "DIR/testdev_balanced_questions.json and DIR/images/", _read_original)
PARQUET = Layout(
    "Parquet (lmms-lab/GQA)",
    "DIR/testdev_balanced_instructions/testdev-*.parquet and DIR/testdev_balanced_images/testdev-*.parquet",
    _read_parquet,
)
