"""Readers of TextVQA: the authors' files, and Parquet.

    TextVQA_0.5.1_val.json                      {"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901",
    train_images/003a8ae2ef43b901.jpg             "question": "what is the brand of this camera?", "answers": [ten]}]}

The images of the validation split are in the folder of the training images. The test split has no answers. Predictions
are then written in EvalAI's format.
"""

import functools
import pathlib

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

_IMAGE_FOLDERS = ("train_images", "train_val_images/train_images")
_TEST_IMAGE_FOLDERS = ("test_images",)


def _read_original(folder: pathlib.Path, split: str) -> Found | None:
    paths = files.find(folder, f"TextVQA_0.5.1_{split}.json")
    if not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(
            f"{paths[0]}: expected the questions in a list 'data', as in TextVQA's files; there is no such list"
        )
    images = files.ImageFolders(paths[0], _TEST_IMAGE_FOLDERS if split == "test" else _IMAGE_FOLDERS)
    records = files.records(content["data"], f"{paths[0]}, data")
    return Found(files.questions(records, functools.partial(_question, images)))


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), ("image",), functools.partial(_question, None))


def _question(images: files.ImageFolders | None, row: Row) -> Question:
    image = row.get("image") if images is None else images.find(f"{row.text('image_id')}.jpg")
    answers = row.answers("answers")
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
    images=(*_IMAGE_FOLDERS, *_TEST_IMAGE_FOLDERS),
)
PARQUET = Layout(
    "Parquet (lmms-lab/textvqa)",
    "DIR/data/{split}-*.parquet with question_id, question, answers, image",
    _read_parquet,
    is_specific=False,
)
