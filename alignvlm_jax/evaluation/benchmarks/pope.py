"""POPE: is there such a thing in the photograph? In three parts, by how the things that are not there were chosen.

    coco_pope_random.json (also coco/...)       {"question_id": 1, "image": "COCO_val2014_000000016631.jpg",
    coco_pope_popular.json                       "text": "Is there a snowboard in the image?", "label": "yes"}
    coco_pope_adversarial.json                  one a line
    val2014/COCO_val2014_000000016631.jpg       COCO's images

In Parquet (lmms-lab/POPE): question_id, question, answer, category, image. Source: AoiDragon/POPE, output/coco.
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
    found = {category: files.find(folder, name, f"coco/{name}", f"*/coco/{name}") for category, name in names.items()}
    if split != "test" or not any(found.values()):
        return None
    if missing := [category for category, paths in found.items() if not paths]:
        raise UserError(f"{folder}: of POPE the parts {', '.join(missing)} are not there ({ORIGINAL.expected})")
    roots = [path[0].parent for path in found.values()] + [folder]
    places = [root / name for root in roots for name in _IMAGE_FOLDERS]
    images = next((place for place in places if place.is_dir() and any(place.glob("COCO_*"))), places[0])
    return (
        question
        for category, paths in found.items()
        for question in files.questions(files.json_lines(paths[0]), functools.partial(_original, images, category))
    )


def _original(images: pathlib.Path, category: str, row: Row) -> Question:
    return _question(row, category, row.text("text"), images / row.text("image"), row.text("label"))


def _read_parquet(folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    found = files.find(folder, *(f"{where}{split}-*.parquet" for where in ("data/", "")))
    if not found:
        return None
    rows = (row for file in found for row in files.parquet_rows(file, ("image",)))
    return files.questions(
        rows,
        lambda row: _question(row, row.text("category"), row.text("question"), row.get("image"), row.text("answer")),
    )


def _question(row: Row, category: str, text: str, image, label: str) -> Question:
    if label not in ("yes", "no"):
        raise UserError(f"{row.where}: the answer is {label!r}, not yes or no")
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
