"""Reader of MM-Vet: open questions for a GPT-4 judge.

The judge is not run here. The answers are written to a file for MM-Vet's evaluator instead.

    mm-vet.json                                 {"v1_0": {"imagename": "v1_0.png", "question": "What is x in the
    images/v1_0.png                               equation?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}}

The evaluator takes {"v1_0": "x = -1 or x = -5", ...}. Source: yuweihao/MM-Vet, README.
"""

import functools
import pathlib
from collections.abc import Iterable, Sequence

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout
from alignvlm_jax.evaluation.benchmarks.question import Question


def _read(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    paths = files.find(folder, "mm-vet.json", "*/mm-vet.json")
    if split != "test" or not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict):
        raise UserError(f"{paths[0]}: expected an object with one entry per question, as in MM-Vet's file")
    rows = (
        ({"id": id, **entry} if isinstance(entry, dict) else entry, f"{paths[0]}: {id}")
        for id, entry in content.items()
    )
    return files.questions(rows, functools.partial(_question, paths[0].parent / "images"))


def _question(images: pathlib.Path, row: Row) -> Question:
    # There are no references, because the answers in the file are for the judge.
    return Question(
        id=row.text("id"), where=row.where, text=row.text("question"), images=(images / row.text("imagename"),)
    )


def submission(questions: Sequence[Question], answers: dict[str, str | None]) -> dict[str, str]:
    """Returns the content for MM-Vet's evaluator. A question that could not be asked gets an empty answer."""
    return {question.id: answers[question.id] or "" for question in questions}


ORIGINAL = Layout("the authors' (yuweihao/MM-Vet)", "DIR/mm-vet.json and DIR/images/", _read)
