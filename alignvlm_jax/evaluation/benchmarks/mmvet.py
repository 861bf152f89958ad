"""Readers of MM-Vet: open questions for a GPT-4 judge.

The judge is not run here. The answers are written to a file for MM-Vet's evaluator instead.

    mm-vet/mm-vet.json                          {"v1_0": {"imagename": "v1_0.png", "question": "What is x in the
    mm-vet/images/v1_0.png                          equation?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}}

The evaluator takes {"v1_0": "x = -1 or x = -5", ...}. Source: yuweihao/MM-Vet, README.
"""

import functools
import pathlib
from collections.abc import Sequence

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question


def _read(folder: pathlib.Path, split: str) -> Found | None:
    paths = files.find(folder, "mm-vet.json")
    if split != "test" or not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict):
        raise UserError(f"{paths[0]}: expected an object with one entry per question, as in MM-Vet's file")
    rows = (
        ({"id": id, **entry} if isinstance(entry, dict) else entry, f"{paths[0]}: {id}")
        for id, entry in content.items()
    )
    return Found(files.questions(rows, functools.partial(_question, files.ImageFolders(paths[0], ("images",)))))


def _question(images: files.ImageFolders, row: Row) -> Question:
    # There are no references, because the answers in the file are for the judge.
    image = images.find(row.text("imagename"))
    return Question(id=row.text("id"), where=row.where, text=row.text("question"), images=(image,))


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), ("image",), _question_from_parquet)


def _question_from_parquet(row: Row) -> Question:
    # The number follows "v1_" in the authors' file, which the judge expects.
    name = row.text("question_id")
    return Question(
        id=name if name.startswith("v1_") else f"v1_{name}",
        where=row.where,
        text=row.text("question"),
        images=(row.get("image"),),
    )


def submission(questions: Sequence[Question], answers: dict[str, str | None]) -> dict[str, str]:
    """Returns the content for MM-Vet's evaluator. A question that could not be asked gets an empty answer."""
    return {question.id: answers[question.id] or "" for question in questions}


ORIGINAL = Layout(
    "the authors' (yuweihao/MM-Vet)", "DIR/mm-vet/mm-vet.json and DIR/mm-vet/images/", _read, images=("images",)
)
PARQUET = Layout(
    "Parquet (lmms-lab/MMVet)",
    "DIR/data/{split}-*.parquet with question_id, question, image",
    _read_parquet,
    is_specific=False,
)
