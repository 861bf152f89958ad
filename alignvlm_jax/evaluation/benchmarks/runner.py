"""`alignvlm eval --benchmark`: reads, asks, scores, and prints ours beside the paper's."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from alignvlm_jax.checkpoints.provenance import versions
from alignvlm_jax.data.images import open_image
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files, summary
from alignvlm_jax.evaluation.benchmarks.outcome import Outcome
from alignvlm_jax.evaluation.benchmarks.paper import AVERAGED, FOUR
from alignvlm_jax.evaluation.benchmarks.predictions import Predictions
from alignvlm_jax.evaluation.benchmarks.question import IMAGE, Picture, Question
from alignvlm_jax.evaluation.benchmarks.table import Benchmark, find_benchmarks
from alignvlm_jax.evaluation.identity import identify, is_pruned
from alignvlm_jax.evaluation.runner import write_json
from alignvlm_jax.inference.reader import CutImage, Reader, load
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh

_QUESTIONS_AT_ONCE = 64
"""At least so many prompts are made before they are answered: enough to fill batches with prompts of like size."""


def evaluate_benchmarks(
    checkpoint: str | os.PathLike,
    names: Sequence[str],
    *,
    data: str | os.PathLike,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    views: int = 1,
    json_file: str | None = None,
    predictions_file: str | None = None,
    mesh: MeshConfig | None = None,
) -> list[Outcome]:
    """Asks a checkpoint the questions of benchmarks, prints the table, writes the files asked for.

    Args:
      checkpoint: as `inference.reader.load` takes it.
      names: of benchmarks, as the table has them.
      data: the folder that the benchmark's files are in, or one with a folder for each benchmark, called by its name.
      split: another than the benchmark's own.
      limit: ask only the first so many questions of each.
      batch_size: questions decoded at once.
      views: how often each image is looked at (`inference/views.py`).
      json_file: for the figures.
      predictions_file: for the answers; by default beside `json_file`, or in runs/benchmarks. What it has already is
        not asked again.
      mesh: as in `evaluation.runner.evaluate_checkpoint`.
    """
    benchmarks = find_benchmarks(names)
    arguments = dict(names=list(names), data=str(data), split=split, limit=limit, batch_size=batch_size, mesh=str(mesh))
    distributed.require_equal({"checkpoint": str(checkpoint), "views": views, **arguments})
    if mesh is None and jax.process_count() > 1:
        mesh = MeshConfig(data=1, fsdp=-1)
    identity, pruned = identify(checkpoint), is_pruned(checkpoint)
    if views > 1:
        identity["views"] = views  # its answers are others
    for row in benchmarks:
        row.metric((), {})  # What a metric needs and is not installed is said now.
    # All files are read before anything that takes long: what is wrong with the last one is said now.
    read = {row.name: read_questions(row, pathlib.Path(data), split or row.split) for row in benchmarks}
    predictions_file = predictions_file or default_predictions_file(checkpoint, json_file)

    loaded: list[Reader] = []

    def reader() -> Reader:  # Not loaded if all has been answered.
        if not loaded:
            loaded.append(load(checkpoint, batch_size=batch_size, mesh=mesh and make_mesh(mesh)).with_views(views))
        return loaded[0]

    outcomes = []
    with contextlib.ExitStack() as stack:
        primary = distributed.is_primary()
        predictions = stack.enter_context(Predictions(predictions_file)) if primary else None
        for row in benchmarks:
            questions = read[row.name]
            outcomes.append(run(row, split or row.split, questions, reader, predictions, identity, limit=limit))
    if distributed.is_primary():
        print(f"{identity['checkpoint']}: answers in {predictions_file}\n")
        print(summary.format_table(outcomes, pruned=pruned))
        print(summary.format_notes(outcomes))
        _write_submissions(outcomes, pathlib.Path(predictions_file))
        if json_file:
            figures = {**identity, "data": str(data), "predictions": str(predictions_file), "versions": versions()}
            figures["average_of_nine"] = summary.average_of(AVERAGED, outcomes)
            figures["average_of_four"] = summary.average_of(FOUR, outcomes)
            write_json({**figures, "benchmarks": [summary.to_json(outcome) for outcome in outcomes]}, json_file)
    return outcomes


def read_questions(benchmark: Benchmark, data: pathlib.Path, split: str) -> list[Question]:
    """All questions of a benchmark, from the first of its layouts whose files are there.

    Raises:
      UserError: there are none, or none could be asked; it says what is looked for.
    """
    expected = "; ".join(layout.describe(split) for layout in benchmark.layouts)
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder. {benchmark.title} is read from: {expected}")
    folder = data / benchmark.name if (data / benchmark.name).is_dir() else data
    for layout in benchmark.layouts:
        found = layout.read(folder, split)
        if found is None:
            continue
        questions = list(found)
        sound = [question for question in questions if not question.problem]
        if not sound:
            why = f": {questions[0].problem}" if questions else ""
            raise UserError(f"{folder}: no question of {benchmark.title}, split {split}, can be asked{why}")
        shown = [picture for question in sound for picture in question.images]
        if shown and not any(files.is_there(picture) for picture in shown):
            raise UserError(
                f"none of the {len(shown)} images of {benchmark.title} is there, not {shown[0]} for one. Expected is "
                + layout.describe(split)
            )
        return _unique(questions)
    raise UserError(f"{folder}: no files of {benchmark.title}, split {split}. It is read from: {expected}")


def run(
    benchmark: Benchmark,
    split: str,
    questions: Sequence[Question],
    reader: Callable[[], Reader],
    predictions: Predictions | None,
    identity: Mapping[str, Any],
    *,
    limit: int | None = None,
) -> Outcome:
    """Asks what has not been answered yet, and scores.

    With several processes all ask the same; one of them has the predictions.

    Args:
      benchmark, split, questions: see `read_questions`.
      reader: gives the model, when there is something to ask.
      predictions: the file, in the primary process.
      identity: of the checkpoint.
      limit: ask only the first so many.
    """
    started = time.monotonic()
    asked_of = {**identity, "split": split, "prompt": benchmark.prompt, "max_new_tokens": benchmark.max_new_tokens}
    asked_of["questions"] = fingerprint(questions)
    known = predictions.begin(benchmark.name, asked_of) if predictions is not None else {}
    answers: dict[str, str | None] = dict(distributed.gather_json(known)[0])
    questions = list(questions)[:limit]
    problems = {question.id: question.problem for question in questions if question.problem}
    waiting = [question for question in questions if question.id not in answers and question.id not in problems]
    quiet = not distributed.is_primary()
    with tqdm(
        total=len(questions),
        initial=len(questions) - len(waiting),
        desc=benchmark.title,
        unit="question",
        dynamic_ncols=True,
        disable=quiet,
    ) as progress:
        step = max(_QUESTIONS_AT_ONCE, 2 * reader().generator.batch_size) if waiting else 1
        for start in range(0, len(waiting), step):
            answered, unasked = _ask(reader(), benchmark, waiting[start : start + step], progress.update)
            problems |= unasked
            answers |= answered
            if predictions is not None:
                predictions.add(benchmark.name, answered)
    given = {question.id: answers.get(question.id) for question in questions}
    judged = [question for question in questions if question.problem or question.references is not None]
    withheld = all(question.problem for question in judged)
    scores = None if withheld else benchmark.metric(judged, given)
    return Outcome(benchmark, split, questions, given, problems, scores, limit, time.monotonic() - started)


def _ask(
    reader: Reader, benchmark: Benchmark, questions: Sequence[Question], on_batch: Callable[[int], Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """The answers to some questions by id, and why there are none to the others."""
    prompts, problems = {}, {}
    shown_before: tuple[tuple[Picture, ...], list[CutImage]] = ((), [])
    for question in questions:
        try:
            if question.images != shown_before[0]:  # Questions about one page mostly follow each other.
                shown_before = ((), [])
                shown_before = question.images, [_cut(reader, picture) for picture in question.images]
            messages = [{"role": "user", "content": content(benchmark.ask(question), len(question.images))}]
            prompts[question.id] = reader.chat_prompt(messages, shown_before[1])
        except UserError as error:
            problems[question.id] = str(error)
            on_batch(1)
    texts = reader.answer(list(prompts.values()), max_new_tokens=benchmark.max_new_tokens, on_batch=on_batch)
    return dict(zip(prompts, texts, strict=True)), problems


def _cut(reader: Reader, picture: Picture) -> CutImage:
    return reader.cut(open_image(files.image_bytes(picture), name=str(picture), keep_grey=True))


def content(text: str, num_images: int) -> list[dict[str, str]]:
    """A message's parts: images where the text has its marks, and those that it does not place first.

    before: "Is \\ufffc like \\ufffc?", 2
    after:  text "Is ", image, text " like ", image, text "?"
    """
    pieces = text.split(IMAGE)
    if len(pieces) - 1 > num_images:
        raise UserError(f"the question places {len(pieces) - 1} images, and there are {num_images}")
    parts = [{"type": "image"}] * (num_images - len(pieces) + 1)
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece.strip())
    return parts


def fingerprint(questions: Sequence[Question]) -> str:
    """Tells these questions, their order aside not, from others: by ids, texts, choices and references."""
    digest = hashlib.sha256()
    for question in questions:
        fields = [question.id, question.text, question.kind, question.choices, question.references, question.values]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


def default_predictions_file(checkpoint: str | os.PathLike, json_file: str | None) -> str:
    """Beside the figures, or else runs/benchmarks/NAME.jsonl under the current folder."""
    if json_file:
        return str(pathlib.Path(json_file).with_suffix(".predictions.jsonl"))
    path = pathlib.Path(checkpoint).absolute()
    return str(pathlib.Path("runs", "benchmarks", "-".join(path.parts[-2:]) + ".jsonl"))


def _unique(questions: list[Question]) -> list[Question]:
    """The questions, with a problem in place of one whose id was there before."""
    seen: set[str] = set()
    unique = []
    for question in questions:
        if question.id in seen:
            where = f"{question.id} ({question.where})"
            question = dataclasses.replace(question, id=where, problem=f"the id {question.id} is there twice")
        seen.add(question.id)
        unique.append(question)
    return unique


def _write_submissions(outcomes: Sequence[Outcome], predictions_file: pathlib.Path) -> None:
    for outcome in outcomes:
        if outcome.scores is None and outcome.benchmark.submission is not None:
            file = predictions_file.with_suffix(f".{outcome.benchmark.name}-{outcome.split}.submission.json")
            write_json(outcome.benchmark.submission(outcome.questions, outcome.answers), file)
            print(f"{outcome.benchmark.title}: to be handed in, {file}")
