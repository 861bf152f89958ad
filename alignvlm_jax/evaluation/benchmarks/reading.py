"""Finds the files of a benchmark in a folder, in any of its published layouts, and reads its questions.

Publishers' archives and the Hub's cache put the files at different depths, so the folder itself is searched first, then
the folders below it:

    benchmarks/                     --data benchmarks finds all of these
      docvqa/spdocvqa_qas/...         a folder with the benchmark's name on the command line
      DocVQA/DocVQA/validation-*      lmms-lab/DocVQA, as `hf download` writes it
      ChartQA-main/ChartQA Dataset/   an unpacked archive
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from alignvlm_jax.data import nearby
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files, scoring
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout
from alignvlm_jax.evaluation.benchmarks.question import ImageSource, Question
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS, Benchmark

_DEPTH = 4
_MAX_FOLDERS = 2000
_SPLITS: Mapping[str, str] = {"validation": "val", "testdev": "test"}
"""Other names of splits -> their names here."""
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
_SHOWN = 8
_MAX_NAMES = 200_000
# Endings of files that hold benchmarks but are not read, and what to do.
_UNREAD: Mapping[str, str] = {
    ".tsv": "TSV files of VLMEvalKit are not read",
    ".arrow": "Arrow files of `save_to_disk` are not read; store the data set with `to_parquet`",
    ".incomplete": "Downloads were interrupted, as .incomplete shows; repeat them",
    ".lance": "Lance files are not read; store the data set as Parquet",
}


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """The questions of one split of a benchmark.

    Attributes:
      questions: questions in the order of the files, with different ids.
      missing: one sentence for each part of the benchmark that the files lack or have twice.
      remarks: other differences from the published benchmark.
    """

    questions: list[Question]
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def read_questions(benchmark: Benchmark, data: pathlib.Path, split: str, *, allow_partial: bool = False) -> QuestionSet:
    """Returns all questions of a benchmark, from the first of its layouts whose files exist.

    Args:
      benchmark: row of the table of benchmarks.
      data: folder with the files, directly or in a folder below it.
      split: name of the split.
      allow_partial: whether to read a benchmark with a missing part.

    Raises:
      UserError: if no files are found, a part of them is missing, or no question can be asked. The message names the
        expected files.
    """
    split = split_name(split)
    expected = "; ".join(layout.describe(split) for layout in benchmark.layouts)
    if not data.is_dir():
        problem = "this is a file, not a folder" if data.exists() else "no such folder"
        raise UserError(f"--data {data}: {problem}. Expected files of {benchmark.title}: {expected}")
    match = _find(benchmark, data, split)
    if match is None:
        hint = "".join(f"{sentence}. " for sentence in _hints(benchmark, data, split))
        raise UserError(f"{data}: no files of {benchmark.title}, split {split}. {hint}Expected files: {expected}")
    layout, folder, found = match
    # The first layout that recognizes the files is used, even if its questions turn out to be unusable.
    questions = list(found.questions)
    valid = [question for question in questions if not question.problem]
    if not valid:
        reason = f": {questions[0].problem}" if questions else ""
        raise UserError(f"{folder}: no question of {benchmark.title}, split {split}, can be asked{reason}")
    if found.missing and not allow_partial:
        raise UserError(
            f"{benchmark.title}, split {split}: not exactly the published files. {'; '.join(found.missing)}. Complete "
            "them, or score what is there with --allow-partial, which marks the score"
        )
    images = [image for question in valid for image in question.images]
    if images and not any(files.image_exists(image) for image in images):
        packed = "".join(f"{sentence}. " for sentence in _archives(data))
        raise UserError(
            f"{folder}: none of the {len(images)} images of {benchmark.title} exists, for example {images[0]}. "
            f"{_similar_image(images[0], data)}{packed}Expected files: {layout.describe(split)}"
        )
    return QuestionSet(_unique(questions), found.missing, tuple(_count_remarks(benchmark, split, questions)))


def split_name(split: str) -> str:
    """Returns the name that a split has here: "validation" -> "val"."""
    return _SPLITS.get(split, split)


def _find(benchmark: Benchmark, data: pathlib.Path, split: str) -> tuple[Layout, pathlib.Path, Found] | None:
    """Returns the layout, the folder and the questions of a benchmark, or None."""
    for level in _levels(benchmark, data):
        matches = []
        for folder, owner in level:
            is_given = folder in (data, data / benchmark.name)
            match = _read_folder(benchmark, folder, split, owner, is_given=is_given)
            if match is not None:
                matches.append((owner == benchmark.name, *match))
        # A folder with the benchmark's name is more certain than others.
        named = [match for is_named, *match in matches if is_named]
        candidates = named or [match for _, *match in matches]
        if len(candidates) > 1:
            folders = " and ".join(str(folder) for _, folder, _ in candidates)
            raise UserError(f"{benchmark.title} was found in {len(candidates)} folders: {folders}. Give one as --data")
        if candidates:
            return tuple(candidates[0])
    return None


def _read_folder(
    benchmark: Benchmark, folder: pathlib.Path, split: str, owner: str | None, *, is_given: bool
) -> tuple[Layout, pathlib.Path, Found] | None:
    """Returns the first layout of a benchmark that a folder has, or None.

    Args:
      benchmark: the benchmark.
      folder: folder to read.
      split: name of the split.
      owner: benchmark that the folder is named after, or None.
      is_given: whether the user gave this folder; others are read only if they fit.
    """
    for layout in benchmark.layouts:
        # "validation-*.parquet" in a folder InfographicVQA must not be read as DocVQA.
        if not layout.is_specific and owner not in (None, benchmark.name):
            continue
        found = layout.read(folder, split)
        if found is None:
            continue
        if layout.is_specific or is_given or owner == benchmark.name:
            return layout, folder, found
        try:
            first, rest = _first(iter(found.questions))
        except UserError:  # Not a file of this benchmark, or a damaged one.
            continue
        if first is not None and not first.problem:
            return layout, folder, dataclasses.replace(found, questions=rest)
    return None


def _levels(benchmark: Benchmark, data: pathlib.Path) -> Iterator[list[tuple[pathlib.Path, str | None]]]:
    """Yields the folders to search, by depth, each with the benchmark that it or a folder above it is named after."""
    owner = _owner(data.resolve().name)
    if (data / benchmark.name).is_dir():
        yield [(data / benchmark.name, benchmark.name)]
    level: list[tuple[pathlib.Path, str | None]] = [(data, owner)]
    budget = _MAX_FOLDERS
    for _ in range(_DEPTH + 1):
        yield level
        below = ((child, _owner(child.name) or owner) for folder, owner in level for child in _folders(folder))
        level = list(itertools.islice(below, budget))
        budget -= len(level)


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders in a folder, sorted, without hidden ones and the contents of the Hub's cache."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".") and name not in ("blobs", "refs")]


def _owner(name: str) -> str | None:
    """Returns the benchmark that a folder is named after: "datasets--lmms-lab--DocVQA" -> "docvqa"."""
    return _names().get(_normalize(name.rpartition("--")[2]))


@functools.cache
def _names() -> dict[str, str]:
    return {
        _normalize(name): benchmark.name
        for benchmark in BENCHMARKS.values()
        for name in (benchmark.name, benchmark.title, *benchmark.folders)
    }


def _normalize(name: str) -> str:
    """Returns a name in lower case without punctuation and the branch that archives of GitHub add."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"-(main|master)$", "", name.lower()))


def _first(questions: Iterator[Question]) -> tuple[Question | None, Iterator[Question]]:
    """Returns the first question, and all questions."""
    first = next(questions, None)
    return first, itertools.chain([first] if first is not None else [], questions)


def _hints(benchmark: Benchmark, data: pathlib.Path, split: str) -> Iterator[str]:
    """Yields what a folder without the benchmark's files has instead."""
    for other in {"val", "test"} - {split}:
        with contextlib.suppress(UserError):
            if _find(benchmark, data, other) is not None:
                yield f"There are files of its split {other} (--split {other})"
    folders = [data, *_folders(data)]
    images = {name for layout in benchmark.layouts for name in layout.images}
    if present := sorted({str(folder / name) for folder in folders for name in images if (folder / name).is_dir()}):
        yield f"Its images are there ({', '.join(present)}), but not its questions"
    owner = _owner(data.resolve().name)
    if owner not in (None, benchmark.name):
        yield f"The folder is named after {BENCHMARKS[owner].title}"
    yield from _archives(data)
    endings = nearby.count_endings(data)
    yield from (sentence for ending, sentence in _UNREAD.items() if ending in endings)
    if not present:
        yield f"It has {nearby.list_names(data)}"


def _similar_image(image: ImageSource, data: pathlib.Path) -> str:
    """Returns a sentence about a file beneath a folder whose name is a missing image's, except for case and ending."""
    if not isinstance(image, pathlib.Path):
        return ""
    paths = (pathlib.Path(parent, name) for parent, _, names in os.walk(data) for name in names)
    for path in itertools.islice(paths, _MAX_NAMES):
        if path.stem.lower() == image.stem.lower() and path.suffix.lower() not in (".json", ".txt", ".xml", ".csv"):
            return f"There is {path}: rename it, or the folder that it is in. "
    return ""


def _archives(folder: pathlib.Path) -> Iterator[str]:
    """Yields a sentence that names archives that were not unpacked."""
    packed = [
        str(path.relative_to(folder))
        for place in (folder, *_folders(folder))
        for path in sorted(place.glob("*"))
        if path.name.endswith(_ARCHIVES) or path.name.startswith("partial-imgs")
    ]
    if packed:
        yield f"Unpack {', '.join(packed[:_SHOWN])} there"


def _count_remarks(benchmark: Benchmark, split: str, questions: Sequence[Question]) -> Iterator[str]:
    """Yields a remark if the number of questions is not a published one."""
    withheld = sum(question.references is None and not question.problem for question in questions)
    if 0 < withheld < len(questions) and benchmark.metric is not scoring.not_scored:
        yield f"number of questions without an answer in the files, which are not scored: {withheld:,}"
    published = benchmark.published.get(split, ())
    number = sum(question.is_published for question in questions)
    if published and number not in published:
        counts = " or ".join(f"{count:,}" for count in published)
        yield f"number of questions in the files: {number:,}, published for the split {split}: {counts}"


def _unique(questions: list[Question]) -> list[Question]:
    """Returns the questions, with a problem and a new id for each question whose id occurred before."""
    seen: set[str] = set()
    unique = []
    for question in questions:
        if question.id in seen:
            new_id = f"{question.id} ({question.where})"
            question = dataclasses.replace(question, id=new_id, problem=f"the id {question.id} occurs twice")
        seen.add(question.id)
        unique.append(question)
    return unique
