"""DocVQA and InfoVQA as the Robust Reading Competition (RRC) gives them out, and in Parquet.

    val_v1.0.json or val_v1.0_withQT.json       {"dataset_name": "docvqa", "data": [{"questionId": 49153,
    documents/pybv0228_81.png                     "question": "What is ...?", "image": "documents/pybv0228_81.png",
                                                  "docId": 14465, "answers": ["0.28"], "data_split": "val"}]}
    infographicsVQA_val_v1.0_withQT.json        {"dataset_name": "infographicVQA", "data": [{"questionId": 98313,
    infographicsvqa_images/38313.jpeg             "question": "Which ...?", "image_local_name": "38313.jpeg",
                                                  "answers": ["pinterest"], "answer_type": [...], ...}]}

The test splits have no answers: predictions are then written in the form that the RRC server takes.
"""

import functools
import pathlib
from collections.abc import Iterable

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

_INFOGRAPHIC_FOLDERS = ("infographicsvqa_images", "images", "infographicvqa_images", ".")


def _read_rrc(patterns: tuple[str, ...], folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    found = files.find(folder, *(pattern.format(split=split) for pattern in patterns))
    if not found:
        return None
    content = files.json_file(found[0])
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(f"{found[0]}: RRC's files have their questions in a list 'data', this one has none")
    records = files.records(content["data"], f"{found[0]}, data")
    return files.questions(records, functools.partial(_of_rrc, found[0].parent))


def _of_rrc(folder: pathlib.Path, row: Row) -> Question:
    if "image" in row:
        image = folder / row.text("image")
    else:
        name = row.text("image_local_name", "image")
        places = [folder / place / name for place in _INFOGRAPHIC_FOLDERS]
        image = next((path for path in places if path.is_file()), places[0])
    return Question(
        id=row.text("questionId"),
        where=row.where,
        text=row.text("question"),
        images=(image,),
        references=row.texts("answers") if "answers" in row else None,
    )


def _read_parquet(name: str, folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    patterns = [f"{where}{part}-*.parquet" for where in (f"{name}/", "data/", "") for part in split_names(split)]
    found = files.find(folder, *patterns)
    if not found:
        return None
    rows = (row for file in found for row in files.parquet_rows(file, ("image",)))
    return files.questions(rows, _of_parquet)


def _of_parquet(row: Row) -> Question:
    return Question(
        id=row.text("questionId"),
        where=row.where,
        text=row.text("question"),
        images=(row.get("image"),),
        references=row.texts("answers") if "answers" in row else None,
    )


def submission(questions: list[Question], answers: dict[str, str | None]) -> list[dict]:
    """What the RRC server takes; a question that could not be asked has an empty answer."""
    return [
        {"questionId": int(question.id) if question.id.isdigit() else question.id, "answer": answers[question.id] or ""}
        for question in questions
    ]


_DOCVQA = ("{split}_v1.0.json", "{split}_v1.0_withQT.json", "*/{split}_v1.0.json", "*/{split}_v1.0_withQT.json")
_INFOVQA = ("infographicsVQA_{split}_v1.0*.json", "*/infographicsVQA_{split}_v1.0*.json")

DOCVQA = Layout(
    "RRC (rrc.cvc.uab.es, task 1)",
    "DIR/{split}_v1.0.json or {split}_v1.0_withQT.json, and DIR/documents/",
    functools.partial(_read_rrc, _DOCVQA),
)
INFOVQA = Layout(
    "RRC (rrc.cvc.uab.es, task 3)",
    "DIR/infographicsVQA_{split}_v1.0_withQT.json, and DIR/infographicsvqa_images/",
    functools.partial(_read_rrc, _INFOVQA),
)
DOCVQA_PARQUET = Layout(
    "Parquet (lmms-lab/DocVQA)",
    "DIR/DocVQA/{split}-*.parquet with questionId, question, answers, image",
    functools.partial(_read_parquet, "DocVQA"),
)
INFOVQA_PARQUET = Layout(
    "Parquet (lmms-lab/DocVQA)",
    "DIR/InfographicVQA/{split}-*.parquet with questionId, question, answers, image",
    functools.partial(_read_parquet, "InfographicVQA"),
)
