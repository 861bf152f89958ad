"""Readers of POPE: yes-or-no questions about the presence of an object in a photograph.

The three parts differ in how the absent objects were chosen.

    coco_pope_random.json (also coco/...)       {"question_id": 1, "image": "COCO_val2014_000000016631.jpg",
    coco_pope_popular.json                       "text": "Is there a snowboard in the image?", "label": "yes"}
    coco_pope_adversarial.json                  one record per line
    val2014/COCO_val2014_000000016631.jpg       COCO's images

The Parquet files (lmms-lab/POPE) have question_id, question, answer, category and image. Source: AoiDragon/POPE,
output/coco.
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout
from alignvlm_jax.evaluation.benchmarks.question import Question

CATEGORIES = ("random", "popular", "adversarial")
_IMAGE_FOLDERS = ("val2014", "images", "coco/val2014", "../val2014", ".")


def _read_original(folder: pathlib.Path, split: str) -> Iterator[Question] | None:
    names = {category: f"coco_pope_{category}.json" for category in CATEGORIES}
    paths_by_category = {
        category: files.find(folder, name, f"coco/{name}", f"*/coco/{name}") for category, name in names.items()
    }
    if split != "test" or not any(paths_by_category.values()):
        return None
    if missing := [category for category, paths in paths_by_category.items() if not paths]:
        raise UserError(f"{folder}: POPE lacks the parts {', '.join(missing)} (expected: {ORIGINAL.expected})")
    # COCO's images may be next to the questions or in a folder of their own.
    roots = [paths[0].parent for paths in paths_by_category.values()] + [folder]
    candidates = [root / name for root in roots for name in _IMAGE_FOLDERS]
    images = next((path for path in candidates if path.is_dir() and any(path.glob("COCO_*"))), candidates[0])
    return (
        question
        for category, paths in paths_by_category.items()
        for question in files.questions(
            files.json_lines(paths[0]), functools.partial(_question_from_original, images, category)
        )
    )


def _question_from_original(images: pathlib.Path, category: str, row: Row) -> Question:
    return _question(row, category, row.text("text"), images / row.text("image"), row.text("label"))


def _read_parquet(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    paths = files.find(folder, *(f"{prefix}{split}-*.parquet" for prefix in ("data/", "")))
    if not paths:
        return None
    rows = (row for path in paths for row in files.parquet_rows(path, ("image",)))
    return files.questions(
        rows,
        lambda row: _question(row, row.text("category"), row.text("question"), row.get("image"), row.text("answer")),
    )


def _question(row: Row, category: str, text: str, image, label: str) -> Question:
    if label not in ("yes", "no"):
        raise UserError(f"{row.where}: expected yes or no as the answer, got {label!r}")
    return Question(
        id=f"{category}:{row.text('question_id')}",
        where=row.where,
        text=text,
        images=(image,),
        references=(label,),
        group=category,
    )


ORIGINAL = Layout(
    "the authors' (AoiDragon/POPE)",
    "DIR/coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (or in DIR/coco/), and DIR/val2014/",
    _read_original,
)
PARQUET = Layout(
    "Parquet (lmms-lab/POPE)",
    "DIR/data/{split}-*.parquet with question_id, question, answer, category, image",
    _read_parquet,
)
