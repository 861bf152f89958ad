"""Readers of ChartQA: the authors' files, and Parquet.

ChartQA Dataset/test/test_human.json        [{"imgname": "41699051005347.png", "query": "How many ...?",
ChartQA Dataset/test/test_augmented.json      "label": "14"}]
ChartQA Dataset/test/png/41699051005347.png
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator

from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

_HALVES = ("human", "augmented")


def _read_original(folder: pathlib.Path, split: str) -> Iterator[Question] | None:
    paths_by_half = {
        half: files.find(folder, f"{split}/{split}_{half}.json", f"*/{split}/{split}_{half}.json") for half in _HALVES
    }
    if not any(paths_by_half.values()):
        return None
    return (
        question
        for half, paths in paths_by_half.items()
        for path in paths[:1]  # A half may be missing.
        for question in files.questions(
            files.records(files.json_file(path), str(path)),
            functools.partial(_question_from_original, path.parent / "png", half),
        )
    )


def _question_from_original(images: pathlib.Path, half: str, row: Row) -> Question:
    # The files have no ids, so a question's id is the number of its record.
    number = row.where.rpartition(" ")[2]
    return Question(
        id=f"{half}:{number}",
        where=row.where,
        text=row.text("query"),
        images=(images / row.text("imgname"),),
        references=(row.text("label"),),
        group=half,
    )


def _read_parquet(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    patterns = [f"{prefix}{name}-*.parquet" for prefix in ("", "data/") for name in split_names(split)]
    paths = files.find(folder, *patterns)
    if not paths:
        return None
    rows = (row for path in paths for row in files.parquet_rows(path, ("image",)))
    return files.questions(rows, _question_from_parquet)


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
)
PARQUET = Layout(
    "Parquet (lmms-lab/ChartQA, HuggingFaceM4/ChartQA)",
    "DIR/data/{split}-*.parquet with question, answer, type, image (or query, label, human_or_machine, image)",
    _read_parquet,
)
