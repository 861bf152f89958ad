"""Readers of DocVQA and InfoVQA: the files of the Robust Reading Competition (RRC), and Parquet.

    spdocvqa_qas/val_v1.0_withQT.json           {"dataset_name": "docvqa", "data": [{"questionId": 49153,
    spdocvqa_images/pybv0228_81.png               "question": "What is ...?", "image": "documents/pybv0228_81.png",
                                                  "docId": 14465, "answers": ["0.28"], "data_split": "val"}]}
    infographicsvqa_qas/infographicsVQA_val_v1.0_withQT.json
    infographicsvqa_images/38313.jpeg           {"dataset_name": "infographicVQA", "data": [{"questionId": 98313,
                                                  "question": "Which ...?", "image_local_name": "38313.jpeg",
                                                  "answers": ["pinterest"], "answer_type": [...], ...}]}

These are the folders that spdocvqa_qas.zip, spdocvqa_images.tar.gz and the archives of InfoVQA unpack to. Earlier
archives had the questions next to the folder documents/.

The test splits have no answers. Predictions are then written in the format of the RRC server.
"""

import functools
import pathlib
import posixpath

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question


def _read_rrc(
    patterns: tuple[str, ...], image_folders: tuple[str, ...], folder: pathlib.Path, split: str
) -> Found | None:
    paths = files.find(folder, *(pattern.format(split=split) for pattern in patterns))
    if not paths:
        return None
    content = files.json_file(paths[0])
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(
            f"{paths[0]}: expected the questions in a list 'data', as in RRC's files; there is no such list"
        )
    records = files.records(content["data"], f"{paths[0]}, data")
    images = files.ImageFolders(paths[0], image_folders)
    return Found(files.questions(records, functools.partial(_question_from_rrc, images)))


def _question_from_rrc(images: files.ImageFolders, row: Row) -> Question:
    # DocVQA names images by path, whose folder "documents" is not in every archive. InfoVQA has the file name only.
    name = row.text("image", "image_local_name")
    return Question(
        id=row.text("questionId"),
        where=row.where,
        text=row.text("question"),
        images=(images.find(name, posixpath.basename(name)),),
        references=row.answers("answers"),
    )


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), ("image",), _question_from_parquet)


def _question_from_parquet(row: Row) -> Question:
    return Question(
        id=row.text("questionId"),
        where=row.where,
        text=row.text("question"),
        images=(row.get("image"),),
        references=row.answers("answers"),
    )


def submission(questions: list[Question], answers: dict[str, str | None]) -> list[dict]:
    """Returns the records for the RRC server. A question that could not be asked gets an empty answer."""
    return [
        {"questionId": int(question.id) if question.id.isdigit() else question.id, "answer": answers[question.id] or ""}
        for question in questions
    ]


_DOCVQA = ("{split}_v1.0_withQT.json", "{split}_v1.0.json")
_INFOVQA = ("infographicsVQA_{split}_v1.0*.json",)
_DOCVQA_IMAGES = (".", "spdocvqa_images", "documents", "images")
_INFOVQA_IMAGES = ("infographicsvqa_images", "images", "infographicvqa_images", ".")

DOCVQA = Layout(
    "RRC (rrc.cvc.uab.es, task 1)",
    "{split}_v1.0_withQT.json or {split}_v1.0.json in DIR or DIR/spdocvqa_qas/, and DIR/spdocvqa_images/ or "
    "DIR/documents/",
    functools.partial(_read_rrc, _DOCVQA, _DOCVQA_IMAGES),
    images=("spdocvqa_images", "documents"),
)
INFOVQA = Layout(
    "RRC (rrc.cvc.uab.es, task 3)",
    "infographicsVQA_{split}_v1.0_withQT.json or infographicsVQA_{split}_v1.0.json in DIR or DIR/infographicsvqa_qas/, "
    "and DIR/infographicsvqa_images/",
    functools.partial(_read_rrc, _INFOVQA, _INFOVQA_IMAGES),
    images=("infographicsvqa_images",),
)
DOCVQA_PARQUET = Layout(
    "Parquet (lmms-lab/DocVQA)",
    "DIR/DocVQA/{split}-*.parquet with questionId, question, answers, image",
    _read_parquet,
    is_specific=False,
)
INFOVQA_PARQUET = Layout(
    "Parquet (lmms-lab/DocVQA)",
    "DIR/InfographicVQA/{split}-*.parquet with questionId, question, answers, image",
    _read_parquet,
    is_specific=False,
)
