"""Reader of MMMU: questions from thirty subjects, with one or more images within the text.

    Accounting/validation-00000-of-00001.parquet     id ("validation_Accounting_1"), question ("... <image 1> ..."),
    Agriculture/validation-...                        options ("['$6', '$7']", as text), answer ("B"), question_type
    ... (MMMU/MMMU), or data/validation-*             ("multiple-choice" or "open"), image_1 ... image_7, subfield
    (lmms-lab/MMMU)

Each mention of an image in the question or the options is replaced by that image, as in VLMEvalKit. lmms-eval by
default puts all images first and keeps the mentions as text. The answers of the test split are withheld ("?").
"""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Sequence

from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row, RowError
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, missing_parts
from alignvlm_jax.evaluation.benchmarks.question import IMAGE, Question

SUBJECTS = (
    "Accounting",
    "Agriculture",
    "Architecture_and_Engineering",
    "Art",
    "Art_Theory",
    "Basic_Medical_Science",
    "Biology",
    "Chemistry",
    "Clinical_Medicine",
    "Computer_Science",
    "Design",
    "Diagnostics_and_Laboratory_Medicine",
    "Economics",
    "Electronics",
    "Energy_and_Power",
    "Finance",
    "Geography",
    "History",
    "Literature",
    "Manage",
    "Marketing",
    "Materials",
    "Math",
    "Mechanical_Engineering",
    "Music",
    "Pharmacy",
    "Physics",
    "Psychology",
    "Public_Health",
    "Sociology",
)
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_MENTION = re.compile(r"<image (\d)>")
_SUBJECT = re.compile(r"[a-z]+_(.+)_\d+")  # "Accounting" in the id "validation_Accounting_1"


def _read(folder: pathlib.Path, split: str) -> Found | None:
    # MMMU has a split called dev, which is not the validation split.
    names = ("validation", "val") if split == "val" else (split,)
    by_subject = {
        subject: files.find_shards(folder, *files.split_patterns(*names, folders=(f"{subject}/",)))
        for subject in SUBJECTS
    }
    present = [subject for subject, (paths, _) in by_subject.items() if paths]
    if present:
        rows = (row for paths, _ in by_subject.values() for path in paths for row in files.parquet_rows(path, IMAGES))
        missing = [sentence for _, sentences in by_subject.values() for sentence in sentences]
        return Found(files.questions(rows, _question), (*missing_parts("MMMU's subjects", SUBJECTS, present), *missing))
    found = files.parquet_questions(folder, names, IMAGES, _question)
    if found is not None and folder.resolve().name in SUBJECTS:
        missing = missing_parts("MMMU's subjects", SUBJECTS, [folder.resolve().name])
        return dataclasses.replace(found, missing=(*missing, *found.missing))
    return found


def _question(row: Row) -> Question:
    options = list_in_text(row.text("options"), row.where) if "options" in row else ()
    is_choice = row.text("question_type") == "multiple-choice"
    answer = row.text("answer")
    references = list_in_text(answer, row.where) if answer.startswith("[") and not is_choice else (answer,)
    subject = _SUBJECT.fullmatch(row.text("id"))
    question = Question(
        id=row.text("id"),
        where=row.where,
        text=row.text("question"),
        references=None if answer in ("", "?") else references,
        group=subject[1].replace("_", " ") if subject else "",
        kind="choice" if is_choice else "open",
        choices=options if is_choice else (),
    )
    return place_images(question, row)


def place_images(question: Question, row: Row) -> Question:
    """Returns the question with an image mark and an image in place of each mention."""
    numbers = [int(number) for text in (question.text, *question.choices) for number in _MENTION.findall(text)]
    images = tuple(row.get(f"image_{number}") for number in numbers)
    # If the text mentions no image, the first image comes before the question.
    if not images and "image_1" in row:
        return dataclasses.replace(question, images=(row.get("image_1"),))
    return dataclasses.replace(
        question,
        text=_MENTION.sub(IMAGE, question.text),
        choices=tuple(_MENTION.sub(IMAGE, choice) for choice in question.choices),
        images=images,
    )


def list_in_text(text: str, where: str) -> tuple[str, ...]:
    """Parses a list in Python syntax: "['a', 'b']" -> ("a", "b")."""
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise RowError(f"{where}: expected a list in Python syntax, got {text[:60]!r}") from error
    if not isinstance(items, list):
        raise RowError(f"{where}: expected a list, got {text[:60]!r}")
    return tuple(str(item) for item in items)


def submission(questions: Sequence[Question], answers: dict[str, str | None]) -> dict[str, str]:
    """Returns the content for MMMU's server: answers by question id."""
    return {question.id: answers[question.id] or "" for question in questions}


PARQUET = Layout(
    "Parquet (MMMU/MMMU, lmms-lab/MMMU)",
    "DIR/<subject>/{split}-*.parquet of the thirty subjects, or DIR/data/{split}-*.parquet, with id, question, "
    "options, answer, question_type, image_1, ...",
    _read,
    is_specific=False,
)
