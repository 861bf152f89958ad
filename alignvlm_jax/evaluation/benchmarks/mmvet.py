"""MM-Vet: open questions whose answers are judged by GPT-4, which is not done here: a file of answers is written.

    mm-vet.json                                 {"v1_0": {"imagename": "v1_0.png", "question": "What is x in the
    images/v1_0.png                               equation?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}}

The file that MM-Vet's evaluator takes is {"v1_0": "x = -1 or x = -5", ...}. Source: yuweihao/MM-Vet, README.
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
    found = files.find(folder, "mm-vet.json", "*/mm-vet.json")
    if split != "test" or not found:
        return None
    content = files.json_file(found[0])
    if not isinstance(content, dict):
        raise UserError(f"{found[0]}: MM-Vet's file has an object with a name for each question")
    rows = (
        ({"id": id, **entry} if isinstance(entry, dict) else entry, f"{found[0]}: {id}")
        for id, entry in content.items()
    )
    return files.questions(rows, functools.partial(_question, found[0].parent / "images"))


def _question(images: pathlib.Path, row: Row) -> Question:
    # Its answers are for the judge: nothing is compared with them here.
    return Question(
        id=row.text("id"), where=row.where, text=row.text("question"), images=(images / row.text("imagename"),)
    )


def submission(questions: Sequence[Question], answers: dict[str, str | None]) -> dict[str, str]:
    """What MM-Vet's evaluator takes; a question that could not be asked has an empty answer."""
    return {question.id: answers[question.id] or "" for question in questions}


ORIGINAL = Layout("the authors' (yuweihao/MM-Vet)", "DIR/mm-vet.json and DIR/images/", _read)
