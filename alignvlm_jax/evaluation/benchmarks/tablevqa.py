"""Reader of TableVQA-Bench: questions about images of tables, in four parts.

    data/vwtq-00000-of-00001.parquet            qa_id, question, gt, image (text_html_table and others are not read)
    data/vwtq_syn-*  data/vtabfact-*  data/fintabnetqa-*

Source: naver-ai/tablevqabench, inference_examples.ipynb and src/evaluate_tablevqa_dataset.py; terryoo/TableVQA-Bench.
"""

import functools
import pathlib

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, missing_parts
from alignvlm_jax.evaluation.benchmarks.question import Question

PARTS = ("vwtq", "vwtq_syn", "vtabfact", "fintabnetqa")


def _read(folder: pathlib.Path, split: str) -> Found | None:
    shards = {part: files.find_shards(folder, *files.split_patterns(part)) for part in PARTS}
    if split != "test" or not any(paths for paths, _ in shards.values()):
        return None
    questions = (
        question
        for part, (paths, _) in shards.items()
        for path in paths
        for question in files.questions(files.parquet_rows(path, ("image",)), functools.partial(_question, part))
    )
    parts = missing_parts("TableVQA-Bench's parts", PARTS, [part for part, (paths, _) in shards.items() if paths])
    return Found(questions, (*parts, *(sentence for _, missing in shards.values() for sentence in missing)))


def _question(part: str, row: Row) -> Question:
    answer = row.text("gt")
    if part == "vtabfact" and answer not in ("0", "1"):
        raise UserError(f"{row.where}: expected 1 or 0 as the answer to a statement, got {answer!r}")
    return Question(
        id=f"{part}:{row.text('qa_id')}",
        where=row.where,
        text=row.text("question"),
        images=(row.get("image"),),
        references=(answer,),
        group=part,
        kind=part,
    )


PARQUET = Layout(
    "Parquet (terryoo/TableVQA-Bench)",
    "DIR/data/{vwtq,vwtq_syn,vtabfact,fintabnetqa}-*.parquet with qa_id, question, gt, image",
    _read,
)
