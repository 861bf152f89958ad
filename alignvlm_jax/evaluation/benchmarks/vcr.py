"""Reader of VCR-wiki: partly covered texts below a photograph, to be restored from their visible stripes.

    data/test-00000-of-00005.parquet            question_id, stacked_image (shown to the model), crossed_text (list of
    of vcr-org/VCR-wiki-en-easy-test, and         covered texts), caption; image and only_it_image are not read
    -en-hard-, -zh-easy-, -zh-hard-test

A single question asks for all covered texts, and each is searched for in the answer (`metrics.vcr_scores`).
Source: tianyu-z/VCR; lmms-eval, tasks/vcr_wiki.
"""

import pathlib

from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

# Only the first one is shown to the model. The others are listed because columns that are not are read as text, and
# these are large.
_IMAGES = ("stacked_image", "image", "only_it_image", "only_it_image_small")


def _read(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), _IMAGES, _question)


def _question(row: Row) -> Question:
    number = row.where.rpartition("/")[2]
    return Question(
        id=row.text("question_id") if "question_id" in row else number,
        where=row.where,
        images=(row.get("stacked_image"),),
        references=row.texts("crossed_text"),
    )


def folders(language: str, difficulty: str) -> tuple[str, ...]:
    """Returns the names of the repositories of one of the four sets: the complete set, its test split, and parts."""
    return tuple(f"VCR-wiki-{language}-{difficulty}{part}" for part in ("", "-test", "-test-500", "-test-100"))


def layout(language: str, difficulty: str) -> Layout:
    """Returns the layout of one of the four sets: language en or zh, difficulty easy or hard."""
    repository = f"VCR-wiki-{language}-{difficulty}-test"
    return Layout(
        f"Parquet (vcr-org/{repository})",
        f"DIR/data/{{split}}-*.parquet or DIR/{repository}/data/..., with stacked_image, crossed_text",
        _read,
        is_specific=False,
    )
