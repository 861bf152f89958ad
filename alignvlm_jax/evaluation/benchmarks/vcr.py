"""VCR-wiki: texts in a picture of which only stripes are left, to be restored from them and from the photograph above.

    data/test-00000-of-00005.parquet            question_id, stacked_image (what is shown), crossed_text (the covered
    of vcr-org/VCR-wiki-en-easy-test, and         texts, several), caption; image and only_it_image are not read
    -en-hard-, -zh-easy-, -zh-hard-test

All covered texts are asked for at once, and each is looked for in the one answer (`metrics.vcr_scores`).
Source: tianyu-z/VCR; lmms-eval, tasks/vcr_wiki.
"""

import functools
import pathlib
from collections.abc import Iterable

from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout
from alignvlm_jax.evaluation.benchmarks.question import Question

# What the files hold besides, and is large.
_IMAGES = ("stacked_image", "image", "only_it_image", "only_it_image_small")


def _read(repository: str, folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    found = files.find(folder, *(f"{where}{split}-*.parquet" for where in (f"{repository}/data/", "data/", "")))
    if not found:
        return None
    rows = (row for file in found for row in files.parquet_rows(file, _IMAGES))
    return files.questions(rows, _question)


def _question(row: Row) -> Question:
    number = row.where.rpartition("/")[2]
    return Question(
        id=row.text("question_id") if "question_id" in row else number,
        where=row.where,
        images=(row.get("stacked_image"),),
        references=row.texts("crossed_text"),
    )


def layout(language: str, difficulty: str) -> Layout:
    """Of one of the four sets."""
    repository = f"VCR-wiki-{language}-{difficulty}-test"
    return Layout(
        f"Parquet (vcr-org/{repository})",
        f"DIR/data/{{split}}-*.parquet or DIR/{repository}/data/..., with stacked_image, crossed_text",
        functools.partial(_read, repository),
    )
