"""Readers of GQA: the balanced test-dev questions about objects in photographs and their relations.

    testdev_balanced_questions.json             {"201307251": {"imageId": "n161313", "question": "Is it overcast?",
    images/n161313.jpg                            "answer": "no", "fullAnswer": "No, it is clear.", ...}}

The Parquet files (lmms-lab/GQA) are testdev_balanced_instructions/testdev-*.parquet with id, imageId, question and
answer, and testdev_balanced_images/testdev-*.parquet with id and image. Source: cs.stanford.edu/people/dorarad/gqa.
"""

import functools
import pathlib
from collections.abc import Mapping

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout
from alignvlm_jax.evaluation.benchmarks.question import Cell, Question


def _read_original(folder: pathlib.Path, split: str) -> Found | None:
    name = "testdev_balanced_questions.json" if split == "test" else f"{split}_balanced_questions.json"
    paths = files.find(folder, name)
    if not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict):
        raise UserError(f"{paths[0]}: expected an object with one entry per question, as in GQA's files")
    images = files.ImageFolders(paths[0], ("images",))
    rows = (
        ({"id": id, **entry} if isinstance(entry, dict) else entry, f"{paths[0]}: {id}")
        for id, entry in content.items()
    )
    return Found(files.questions(rows, lambda row: _question(row, images.find(f"{row.text('imageId')}.jpg"))))


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    paths, missing = files.find_shards(
        folder, *files.split_patterns("testdev", folders=("testdev_balanced_instructions/",))
    )
    if split != "test" or not paths:
        return None
    # Many questions share an image, so the images are in files of their own.
    images: dict[str, Cell] = {}
    image_paths, missing_images = files.find_shards(
        folder, *files.split_patterns("testdev", folders=("testdev_balanced_images/",))
    )
    for path in image_paths:
        images |= {fields.get("id"): fields.get("image") for fields, _ in files.parquet_rows(path, ("image",))}
    if not images:
        raise UserError(f"{folder}: no images of GQA found (expected: {PARQUET.expected})")
    rows = (row for path in paths for row in files.parquet_rows(path, ()))
    return Found(files.questions(rows, functools.partial(_question_from_parquet, images)), missing + missing_images)


def _question_from_parquet(images: Mapping[str, Cell], row: Row) -> Question:
    image_id = row.text("imageId")
    if image_id not in images:
        raise UserError(f"{row.where}: the image files have no image {image_id!r}")
    return _question(row, images[image_id])


def _question(row: Row, image: pathlib.Path | Cell) -> Question:
    return Question(
        id=row.text("id"), where=row.where, text=row.text("question"), images=(image,), references=(row.text("answer"),)
    )


ORIGINAL = Layout(
    "the authors' (cs.stanford.edu/people/dorarad/gqa)",
    "testdev_balanced_questions.json in DIR or DIR/questions1.2/, and DIR/images/",
    _read_original,
    images=("images",),
)
PARQUET = Layout(
    "Parquet (lmms-lab/GQA)",
    "DIR/testdev_balanced_instructions/testdev-*.parquet and DIR/testdev_balanced_images/testdev-*.parquet",
    _read_parquet,
)
