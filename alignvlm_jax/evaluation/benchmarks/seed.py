"""Readers of SEED-Bench: multiple-choice questions about photographs. Questions about videos are skipped.

    SEED-Bench.json                             {"questions": [{"question_id": "101669", "question": "How many ...?",
    SEED-Bench-image/1454426_2591111986           "choice_a": "One", ..., "choice_d": "Four", "answer": "A",
                                                  "data_type": "image", "data_id": "1454426_2591111986",
                                                  "question_type_id": 5}], "question_type": {"Instance Counting": 5}}

The Parquet files (lmms-lab/SEED-Bench) have the same fields and a list `image`. Source: AILab-CVC/SEED-Bench,
DATASET.md.
"""

import functools
import pathlib
from collections.abc import Mapping

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import ImageSource, Question

# Names of the question types, for files that do not define them.
_TYPES = {
    "1": "Scene Understanding",
    "2": "Instance Identity",
    "3": "Instance Attributes",
    "4": "Instance Location",
    "5": "Instances Counting",
    "6": "Spatial Relation",
    "7": "Instance Interaction",
    "8": "Visual Reasoning",
    "9": "Text Understanding",
}


def _read_original(folder: pathlib.Path, split: str) -> Found | None:
    paths = files.find(folder, "SEED-Bench.json")
    if split != "test" or not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict) or "questions" not in content:
        raise UserError(
            f"{paths[0]}: expected the questions in a list 'questions', as in SEED-Bench's file; there is no such list"
        )
    # The file maps names to numbers, while questions have the numbers.
    types = content.get("question_type")
    names = {str(number): name for name, number in types.items()} if isinstance(types, dict) else _TYPES
    records = files.records(content["questions"], f"{paths[0]}, questions")
    images = files.ImageFolders(paths[0], ("SEED-Bench-image",))
    return Found(files.questions(records, functools.partial(_question_from_original, images, names)))


def _question_from_original(images: files.ImageFolders, types: Mapping[str, str], row: Row) -> Question | None:
    return _question(row, types, (images.find(row.text("data_id")),)) if row.text("data_type") == "image" else None


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), ("image",), _question_from_parquet)


def _question_from_parquet(row: Row) -> Question | None:
    if row.text("data_type") != "image":
        return None
    images = row.get("image")
    return _question(row, _TYPES, tuple(images) if isinstance(images, list) else (images,))


def _question(row: Row, types: Mapping[str, str], images: tuple[ImageSource, ...]) -> Question:
    number = row.text("question_type_id")
    return Question(
        id=row.text("question_id"),
        where=row.where,
        text=row.text("question"),
        images=images,
        references=(row.text("answer"),),
        choices=tuple(row.text(f"choice_{letter}") for letter in "abcd"),
        group=types.get(number, number),
    )


ORIGINAL = Layout(
    "the authors' (AILab-CVC/SEED-Bench)",
    "DIR/SEED-Bench.json and DIR/SEED-Bench-image/",
    _read_original,
    images=("SEED-Bench-image",),
)
PARQUET = Layout(
    "Parquet (lmms-lab/SEED-Bench)",
    "DIR/data/{split}-*.parquet with question_id, question, choice_a ... choice_d, answer, data_type, image",
    _read_parquet,
    is_specific=False,
)
