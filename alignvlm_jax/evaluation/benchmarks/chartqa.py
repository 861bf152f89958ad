"""Readers of ChartQA: the authors' files, and Parquet.

ChartQA Dataset/test/test_human.json        [{"imgname": "41699051005347.png", "query": "How many ...?",
ChartQA Dataset/test/test_augmented.json      "label": "14"}]
ChartQA Dataset/test/png/41699051005347.png
"""

import functools
import pathlib

from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

_HALVES = ("human", "augmented")


def _read_original(folder: pathlib.Path, split: str) -> Found | None:
    names = {half: f"{split}_{half}.json" for half in _HALVES}
    paths = {half: files.find(folder, f"{split}/{name}", name) for half, name in names.items()}
    present = {half: found[0] for half, found in paths.items() if found}
    if not present:
        return None
    questions = (
        question
        for half, path in present.items()
        for question in files.questions(
            files.records(files.json_file(path), str(path)),
            functools.partial(_question_from_original, files.ImageFolders(path, ("png", "images"), levels=0), half),
        )
    )
    absent = [name for half, name in names.items() if half not in present]
    return Found(questions, tuple(f"{folder}: one of ChartQA's two halves is missing, {name}" for name in absent))


def _question_from_original(images: files.ImageFolders, half: str, row: Row) -> Question:
    # The files have no ids, so a question's id is the number of its record.
    number = row.where.rpartition(" ")[2]
    return Question(
        id=f"{half}:{number}",
        where=row.where,
        text=row.text("query"),
        images=(images.find(row.text("imgname")),),
        references=(row.text("label"),),
        group=half,
    )


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), ("image",), _question_from_parquet)


def _question_from_parquet(row: Row) -> Question:
    # HuggingFaceM4/ChartQA numbers the halves; lmms-lab/ChartQA names them.
    if "human_or_machine" in row:
        half = _HALVES[int(row.get("human_or_machine"))]
    else:
        half = row.text("type").removesuffix("_test").removesuffix("_val")
    answer = row.get("answer", "label")
    return Question(
        id=f"{half}:{row.where.rpartition('/')[2]}",
        where=row.where,
        text=row.text("question", "query"),
        images=(row.get("image"),),
        references=tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),),
        group=half,
    )


ORIGINAL = Layout(
    "the authors' (vis-nlp/ChartQA)",
    "DIR/{split}/{split}_human.json, {split}_augmented.json and png/, or 'DIR/ChartQA Dataset/{split}/...'",
    _read_original,
    images=("png",),
)
PARQUET = Layout(
    "Parquet (lmms-lab/ChartQA, HuggingFaceM4/ChartQA)",
    "DIR/data/{split}-*.parquet with question, answer, type, image (or query, label, human_or_machine, image)",
    _read_parquet,
    is_specific=False,
)
