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

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, missing_parts, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

CATEGORIES = ("random", "popular", "adversarial")
_IMAGE_FOLDERS = ("val2014", "coco/val2014", "images", ".")


def _read_original(folder: pathlib.Path, split: str) -> Found | None:
    names = {category: f"coco_pope_{category}.json" for category in CATEGORIES}
    paths = {category: files.find(folder, name, f"coco/{name}") for category, name in names.items()}
    present = {category: found[0] for category, found in paths.items() if found}
    if split != "test" or not present:
        return None
    questions = (
        question
        for category, path in present.items()
        for question in files.questions(
            files.json_lines(path),
            functools.partial(_question_from_original, files.ImageFolders(path, _IMAGE_FOLDERS), category),
        )
    )
    return Found(questions, missing_parts("POPE's parts", names.values(), [names[category] for category in present]))


def _question_from_original(images: files.ImageFolders, category: str, row: Row) -> Question:
    return _question(row, category, row.text("text"), images.find(row.text("image")), row.text("label"))


def _read_parquet(folder: pathlib.Path, split: str) -> Found | None:
    return files.parquet_questions(folder, split_names(split), ("image",), _question_from_parquet)


def _read_parts(folder: pathlib.Path, split: str) -> Found | None:
    shards = {
        part: files.find_shards(folder, *files.split_patterns(part, folders=("Full/", ""))) for part in CATEGORIES
    }
    present = [part for part, (paths, _) in shards.items() if paths]
    if split != "test" or not present:
        return None
    rows = (row for paths, _ in shards.values() for path in paths for row in files.parquet_rows(path, ("image",)))
    missing = [sentence for _, sentences in shards.values() for sentence in sentences]
    return Found(
        files.questions(rows, _question_from_parquet), (*missing_parts("POPE's parts", CATEGORIES, present), *missing)
    )


def _question_from_parquet(row: Row) -> Question:
    return _question(row, row.text("category"), row.text("question"), row.get("image"), row.text("answer"))


def _question(row: Row, category: str, text: str, image, label: str) -> Question:
    if label.strip().lower() not in ("yes", "no"):
        raise UserError(f"{row.where}: expected yes or no as the answer, got {label!r}")
    return Question(
        id=f"{category}:{row.text('question_id')}",
        where=row.where,
        text=text,
        images=(image,),
        references=(label.strip().lower(),),
        group=category,
    )


ORIGINAL = Layout(
    "the authors' (AoiDragon/POPE)",
    "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json in DIR, DIR/coco/ or "
    "DIR/output/coco/, and DIR/val2014/",
    _read_original,
    images=("val2014",),
)
PARQUET = Layout(
    "Parquet (lmms-lab/POPE)",
    "DIR/data/{split}-*.parquet with question_id, question, answer, category, image",
    _read_parquet,
    is_specific=False,
)
PARQUET_PARTS = Layout(
    "Parquet (lmms-lab/POPE, Full)",
    "DIR/Full/{random,popular,adversarial}-*.parquet, with the same columns",
    _read_parts,
)
