"""Readers of TextVQA: the authors' files, and Parquet.

    TextVQA_0.5.1_val.json                      {"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901",
    train_images/003a8ae2ef43b901.jpg             "question": "what is the brand of this camera?", "answers": [ten]}]}

The images of the validation split are in the folder of the training images. The test split has no answers. Predictions
are then written in EvalAI's format.
"""

import functools
import pathlib
from collections.abc import Iterable

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

_IMAGE_FOLDERS = {"val": ("train_images", "train_val_images/train_images"), "test": ("test_images",)}


def _read_original(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    paths = files.find(folder, f"TextVQA_0.5.1_{split}.json", f"*/TextVQA_0.5.1_{split}.json")
    if not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(
            f"{paths[0]}: expected the questions in a list 'data', as in TextVQA's files; there is no such list"
        )
    names = _IMAGE_FOLDERS[split]
    candidates = [root / name for root in (paths[0].parent, folder) for name in names]
    images = next((path for path in candidates if path.is_dir()), candidates[0])
    records = files.records(content["data"], f"{paths[0]}, data")
    return files.questions(records, functools.partial(_question, images))


def _read_parquet(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    patterns = [f"{prefix}{part}-*.parquet" for prefix in ("data/", "") for part in split_names(split)]
    paths = files.find(folder, *patterns)
    if not paths:
        return None
    rows = (row for path in paths for row in files.parquet_rows(path, ("image",)))
    return files.questions(rows, functools.partial(_question, None))


def _question(images: pathlib.Path | None, row: Row) -> Question:
    image = row.get("image") if images is None else images / f"{row.text('image_id')}.jpg"
    answers = row.texts("answers") if "answers" in row else None
    return Question(
        id=row.text("question_id"), where=row.where, text=row.text("question"), images=(image,), references=answers
    )


def submission(questions: list[Question], answers: dict[str, str | None]) -> list[dict]:
    """Returns the records for EvalAI. A question that could not be asked gets an empty answer."""
    return [
        {
            "question_id": int(question.id) if question.id.isdigit() else question.id,
            "answer": answers[question.id] or "",
        }
        for question in questions
    ]


ORIGINAL = Layout(
    "the authors' (textvqa.org)",
    "DIR/TextVQA_0.5.1_{split}.json, and DIR/train_images/ (for test: test_images/)",
    _read_original,
)
PARQUET = Layout(
    "Parquet (lmms-lab/textvqa)",
    "DIR/data/{split}-*.parquet with question_id, question, answers, image",
    _read_parquet,
)
