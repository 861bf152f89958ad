"""Readers of DocVQA and InfoVQA: the files of the Robust Reading Competition (RRC), and Parquet.

    val_v1.0.json or val_v1.0_withQT.json       {"dataset_name": "docvqa", "data": [{"questionId": 49153,
    documents/pybv0228_81.png                     "question": "What is ...?", "image": "documents/pybv0228_81.png",
                                                  "docId": 14465, "answers": ["0.28"], "data_split": "val"}]}
    infographicsVQA_val_v1.0_withQT.json        {"dataset_name": "infographicVQA", "data": [{"questionId": 98313,
    infographicsvqa_images/38313.jpeg             "question": "Which ...?", "image_local_name": "38313.jpeg",
                                                  "answers": ["pinterest"], "answer_type": [...], ...}]}

The test splits have no answers. Predictions are then written in the format of the RRC server.
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
    paths = files.find(folder, *(pattern.format(split=split) for pattern in patterns))
    if not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(
            f"{paths[0]}: expected the questions in a list 'data', as in RRC's files; there is no such list"
        )
    records = files.records(content["data"], f"{paths[0]}, data")
    return files.questions(records, functools.partial(_question_from_rrc, paths[0].parent))


def _question_from_rrc(folder: pathlib.Path, row: Row) -> Question:
    # DocVQA names images by path, InfoVQA by file name only.
    if "image" in row:
        image = folder / row.text("image")
    else:
        name = row.text("image_local_name", "image")
        candidates = [folder / place / name for place in _INFOGRAPHIC_FOLDERS]
        image = next((path for path in candidates if path.is_file()), candidates[0])
    return Question(
        id=row.text("questionId"),
        where=row.where,
        text=row.text("question"),
        images=(image,),
        references=row.texts("answers") if "answers" in row else None,
    )


def _read_parquet(name: str, folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    patterns = [f"{prefix}{part}-*.parquet" for prefix in (f"{name}/", "data/", "") for part in split_names(split)]
    paths = files.find(folder, *patterns)
    if not paths:
        return None
    rows = (row for path in paths for row in files.parquet_rows(path, ("image",)))
    return files.questions(rows, _question_from_parquet)


def _question_from_parquet(row: Row) -> Question:
    return Question(
        id=row.text("questionId"),
        where=row.where,
        text=row.text("question"),
        images=(row.get("image"),),
        references=row.texts("answers") if "answers" in row else None,
    )


def submission(questions: list[Question], answers: dict[str, str | None]) -> list[dict]:
    """Returns the records for the RRC server. A question that could not be asked gets an empty answer."""
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
