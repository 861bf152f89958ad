"""Runs benchmarks for `alignvlm eval --benchmark`: reads and asks questions, and prints scores next to the paper's.

Answers are appended to a file of predictions as they arrive, and a later run does not ask these questions again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from alignvlm_jax.checkpoints.provenance import versions
from alignvlm_jax.data.images import open_image
from alignvlm_jax.downloads.bucket_copy import local_copy
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files, sources, summary
from alignvlm_jax.evaluation.benchmarks.outcome import Outcome
from alignvlm_jax.evaluation.benchmarks.paper import AVERAGED, FOUR
from alignvlm_jax.evaluation.benchmarks.predictions import Predictions
from alignvlm_jax.evaluation.benchmarks.question import IMAGE, ImageSource, Question
from alignvlm_jax.evaluation.benchmarks.reading import QuestionSet, read_questions, split_name
from alignvlm_jax.evaluation.benchmarks.table import Benchmark, find_benchmarks
from alignvlm_jax.evaluation.identity import identify, is_pruned
from alignvlm_jax.evaluation.page_groups import digest_images, group_by_page
from alignvlm_jax.evaluation.runner import write_json
from alignvlm_jax.inference.answers import AnswerText, count_warnings
from alignvlm_jax.inference.prompts import CutImage
from alignvlm_jax.inference.reader import Reader, load, warn_untrained
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.locations import absolute, is_bucket, location, open_location
from alignvlm_jax.output_files import check_distinct, check_writable, is_stream
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.writing import call_in_primary
from alignvlm_jax.progress import progress_bar

_QUESTIONS_AT_ONCE = 64
"""Minimum number of prompts prepared before they are answered, so that batches can have prompts of similar length."""


@ordinary_modes()
def evaluate_benchmarks(
    checkpoint: str | os.PathLike,
    names: Sequence[str],
    *,
    data: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
    allow_partial: bool = False,
    batch_size: int = 32,
    views: int = 1,
    json_file: str | None = None,
    predictions_file: str | None = None,
    mesh: MeshConfig | None = None,
) -> list[Outcome]:
    """Scores a checkpoint on benchmarks, prints the table, and writes the requested files.

    Args:
      checkpoint: checkpoint as for `inference.reader.load`.
      names: names in the table of benchmarks.
      data: folder with the benchmark's files, or with a subfolder for each benchmark, named after it. A folder in a
        bucket is copied to the disk. None downloads the files from their known source (`sources.py`).
      split: split to score instead of each benchmark's default.
      limit: maximum number of questions per benchmark.
      allow_partial: whether to score a benchmark with a missing part. The score is marked.
      batch_size: number of questions decoded at once.
      views: number of views of each image (see `inference/views.py`).
      json_file: file for the scores.
      predictions_file: file for the answers; by default next to `json_file`, or in runs/benchmarks. Questions that it
        already answers are not asked again.
      mesh: device mesh as for `evaluation.runner.evaluate_checkpoint`.
    """
    benchmarks = find_benchmarks(names)
    split = split and split_name(split)
    # Processes with different arguments would wait for each other forever.
    arguments = dict(names=list(names), data=str(data), split=split, limit=limit, batch_size=batch_size, mesh=str(mesh))
    distributed.require_equal({"checkpoint": str(checkpoint), "views": views, **arguments})
    if mesh is None and jax.process_count() > 1:
        mesh = MeshConfig(data=1, fsdp=-1)
    identity, pruned = identify(checkpoint), is_pruned(checkpoint)
    if views > 1:
        identity["views"] = views  # Answers from several views must not mix with others in the file of predictions.
    # Missing packages and broken files are reported before anything that takes long. Scoring nothing imports the
    # packages of a metric.
    for row in benchmarks:
        row.metric((), {})
    predictions_file = predictions_file or default_predictions_file(checkpoint, json_file)
    if is_stream(predictions_file):
        raise UserError(f"--predictions {predictions_file}: expected a file, from which the next run resumes")
    if json_file:
        check_writable(json_file)
    check_distinct(json=json_file, predictions=predictions_file)
    fetched = {} if data is not None else sources.fetch({row.name: split or row.split for row in benchmarks})
    if data is not None:
        given = local_copy(location(data)) if is_bucket(data) else pathlib.Path(data)
    question_sets = {}
    for row in benchmarks:
        folder = fetched[row.name].folder if fetched else given
        question_sets[row.name] = read_questions(row, folder, split or row.split, allow_partial=allow_partial)

    loaded: list[Reader] = []

    def reader() -> Reader:
        # Load on first use, because a run whose questions are all answered needs no model.
        if not loaded:
            loaded.append(load(checkpoint, batch_size=batch_size, mesh=mesh and make_mesh(mesh)).with_views(views))
        return loaded[0]

    # Only the primary process opens the file of answers. All learn if another run is writing to it.
    outcomes = []
    with call_in_primary(lambda: Predictions(predictions_file)) or contextlib.nullcontext() as predictions:
        for row in benchmarks:
            question_set = question_sets[row.name]
            outcomes.append(run(row, split or row.split, question_set, reader, predictions, identity, limit=limit))
    if distributed.is_primary():
        print(f"{identity['checkpoint']}: answers in {predictions_file}\n")
        print(summary.format_table(outcomes, pruned=pruned))
        print(summary.format_notes(outcomes))
        for model in loaded:
            warn_untrained(model.training)
        _write_submissions(outcomes, open_location(predictions_file))
        if json_file:
            origin = {name: found.name for name, found in fetched.items()} or str(data)
            figures = {**identity, "data": origin, "predictions": str(predictions_file), "versions": versions()}
            figures["average_of_nine"] = summary.average_of(AVERAGED, outcomes)
            figures["average_of_four"] = summary.average_of(FOUR, outcomes)
            figures["partial"] = [outcome.benchmark.name for outcome in outcomes if outcome.missing]
            write_json({**figures, "benchmarks": [summary.to_json(outcome) for outcome in outcomes]}, json_file)
    return outcomes


@ordinary_modes()
def run(
    benchmark: Benchmark,
    split: str,
    question_set: QuestionSet,
    reader: Callable[[], Reader],
    predictions: Predictions | None,
    identity: Mapping[str, Any],
    *,
    limit: int | None = None,
) -> Outcome:
    """Asks the questions that have no stored answer, and scores all answers.

    With several processes, all of them ask the same questions, and only the primary one has the file of predictions.

    Args:
      benchmark: row of the table of benchmarks.
      split: name of the split.
      question_set: all questions of the split, from `read_questions`.
      reader: function that returns the model; called only if a question has to be asked.
      predictions: file of answers in the primary process; None in the others.
      identity: identity of the checkpoint.
      limit: maximum number of questions.
    """
    start_time = time.monotonic()
    # Stored answers count only for the same model, prompt and questions. The limit may differ between runs.
    settings = {**identity, "split": split, "prompt": benchmark.prompt, "max_new_tokens": benchmark.max_new_tokens}
    settings["questions"] = fingerprint(question_set.questions)
    stored_answers = predictions.begin(benchmark.name, settings) if predictions is not None else {}
    # Index 0 is the primary process. Its stored answers decide what all processes ask.
    answers: dict[str, str | None] = dict(distributed.gather_json(stored_answers)[0])
    questions = question_set.questions[:limit]
    problems = {question.id: question.problem for question in questions if question.problem}
    pending = [question for question in questions if question.id not in answers and question.id not in problems]
    with progress_bar(
        desc=benchmark.title,
        total=len(questions),
        initial=len(questions) - len(pending),
        unit="question",
        show=distributed.is_primary(),
    ) as progress:
        # Answers are stored after each group, so a stopped run loses one group at most.
        at_once = max(_QUESTIONS_AT_ONCE, 2 * reader().generator.batch_size) if pending else 1
        for group in groups_of_pages(pending, at_once):
            new_answers, new_problems = _ask(reader(), benchmark, group, progress.update)
            problems |= new_problems
            answers |= new_answers
            if predictions is not None:
                predictions.add(benchmark.name, new_answers)
    # A withheld question has no references and no problem. If all are withheld, there is nothing to score.
    final_answers = {question.id: answers.get(question.id) for question in questions}
    scored = [question for question in questions if question.problem or question.references is not None]
    is_withheld = all(question.problem for question in scored)
    scores = None if is_withheld else benchmark.metric(scored, final_answers)
    kinds = predictions.warnings.get(benchmark.name, {}) if predictions is not None else {}
    return Outcome(
        benchmark,
        split,
        questions,
        final_answers,
        problems,
        scores,
        limit,
        time.monotonic() - start_time,
        missing=question_set.missing,
        remarks=question_set.remarks,
        warnings=count_warnings(kinds.get(question.id, ()) for question in questions),
    )


def _ask(
    reader: Reader, benchmark: Benchmark, questions: Sequence[Question], on_batch: Callable[[int], Any]
) -> tuple[dict[str, AnswerText], dict[str, str]]:
    """Returns answers by question id, and problems by question id for questions that cannot be asked."""
    prompts, problems = {}, {}
    cut_images: dict[ImageSource, CutImage] = {}
    for question in questions:
        try:
            shown = [_cut(reader, image, cut_images) for image in question.images]
            messages = [{"role": "user", "content": content(benchmark.ask(question), len(question.images))}]
            prompts[question.id] = reader.chat_prompt(messages, shown)
        except UserError as error:
            problems[question.id] = str(error)
            on_batch(1)
    texts = reader.answer(list(prompts.values()), max_new_tokens=benchmark.max_new_tokens, on_batch=on_batch)
    return dict(zip(prompts, texts, strict=True)), problems


def _cut(reader: Reader, image: ImageSource, cut_images: dict[ImageSource, CutImage]) -> CutImage:
    """Returns an image cut into tiles: from `cut_images`, or else newly cut and added to them."""
    if image not in cut_images:
        cut_images[image] = reader.cut(open_image(files.image_bytes(image), name=str(image), keep_gray=True))
    return cut_images[image]


def groups_of_pages(questions: Sequence[Question], at_once: int) -> Iterator[list[Question]]:
    """Yields groups of at least `at_once` questions, except for the last one, each with all questions about its pages.

    before: questions about the pages a b a c b, at_once=2
    after:  [a, a], [b, b], [c]

    Questions about the same page get the same image sources, even if each has its own copy of the image.
    """
    pages = [tuple(map(_page_key, question.images)) for question in questions]
    images = {}
    for group in group_by_page(pages, at_once):
        yield [
            dataclasses.replace(questions[i], images=images.setdefault(pages[i], questions[i].images)) for i in group
        ]


def _page_key(image: ImageSource) -> bytes | ImageSource:
    """Returns a value that is equal for equal images.

    Questions about one image name the same file, but each row of a Parquet file has its own copy of the image.
    """
    try:
        if isinstance(image, pathlib.Path):
            return image
        return digest_images([files.image_bytes(image)])
    except UserError:
        return image  # Reported when the question is asked.


def content(text: str, num_images: int) -> list[dict[str, str]]:
    r"""Returns the parts of a message: images at the marks in the text, and images without a mark first.

    before: "Is \ufffc like \ufffc?", 2
    after:  text "Is ", image, text " like ", image, text "?"
    """
    pieces = text.split(IMAGE)
    if len(pieces) - 1 > num_images:
        raise UserError(f"the question has places for {len(pieces) - 1} images, got {num_images}")
    parts = [{"type": "image"}] * (num_images - len(pieces) + 1)
    # Every piece but the first follows an image. Pieces of whitespace only are dropped.
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece.strip())
    return parts


def fingerprint(questions: Sequence[Question]) -> str:
    """Returns a digest of the ids, texts, kinds, choices, references and values of questions, in their order."""
    digest = hashlib.sha256()
    for question in questions:
        fields = [question.id, question.text, question.kind, question.choices, question.references, question.values]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


def default_predictions_file(checkpoint: str | os.PathLike, json_file: str | None) -> str:
    """Returns a path next to the JSON file, or else runs/benchmarks/NAME.jsonl in the current folder."""
    if json_file and not is_stream(json_file):
        return str(open_location(json_file).with_suffix(".predictions.jsonl"))
    # The last two parts of the path, such as demo-checkpoint, tell most checkpoints apart. If they do not,
    # `Predictions` refuses the file.
    path = absolute(open_location(checkpoint))
    return str(pathlib.Path("runs", "benchmarks", "-".join(path.parts[-2:]) + ".jsonl"))


def _write_submissions(outcomes: Sequence[Outcome], predictions_file: pathlib.Path) -> None:
    """Writes the files for the servers and judges of benchmarks without references."""
    for outcome in outcomes:
        if outcome.scores is None and outcome.benchmark.submission is not None:
            file = predictions_file.with_suffix(f".{outcome.benchmark.name}-{outcome.split}.submission.json")
            write_json(outcome.benchmark.submission(outcome.questions, outcome.answers), file)
            print(f"{outcome.benchmark.title}: file to submit: {file}")
