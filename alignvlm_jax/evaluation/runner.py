"""Evaluation of a reader on documents: greedy decoding, exact match, and control images.

Controls replace the images and keep questions and answers. A model that reads its answers from the page fails them:

    none    the page itself
    blank   a white page of the same size; measures what the questions alone reveal
    wrong   a page of another document of the same family; measures what the family's layout and usual values reveal

Conversations written by `alignvlm prepare` are scored in the same way. Each turn of the assistant is an expected
answer, and its prompt contains the preceding turns as they are in the data. They do not support the control `wrong`.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import PIL.Image

from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data import images, store
from alignvlm_jax.data.chat import Message
from alignvlm_jax.data.conversations import make_conversation
from alignvlm_jax.data.nearby import describe_no_dataset
from alignvlm_jax.data.synthetic import HELD_OUT_FONT
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import wrong_answers
from alignvlm_jax.evaluation.answer_metrics import answer_scores, check_metrics, format_scores, scores_to_json
from alignvlm_jax.evaluation.identity import locate
from alignvlm_jax.evaluation.page_groups import digest_images, group_by_page
from alignvlm_jax.evaluation.report import Answer, Report
from alignvlm_jax.inference.answers import AnswerText, format_counts
from alignvlm_jax.inference.generate import Prompt
from alignvlm_jax.inference.reader import Reader, load, warn_untrained
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.locations import join, open_location
from alignvlm_jax.output_files import check_distinct, check_writable, is_stream, open_atomically
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.writing import one_writer_of
from alignvlm_jax.progress import progress_bar

Control = Literal["none", "blank", "wrong"]
Record = Mapping[str, Any]
"""A record from `data/store.py`.

It is a document (id, source for its family, font, encoded image, questions, answers) or a record of
`alignvlm prepare` (id, source, conversation, images).
"""

# Number of pages in memory at once: enough for batches of similar length, and few enough for large pages.
_DOCUMENTS_AT_ONCE = 64


@ordinary_modes()
def evaluate(
    reader: Reader,
    records: Sequence[Record],
    *,
    control: Control = "none",
    unseen_fonts: tuple[str, ...] = (),
    limit: int | None = None,
    max_new_tokens: int = 32,
    title: str = "evaluating",
    seed: int = 0,
) -> Report:
    """Asks all questions about all documents and counts the exact matches.

    With several processes, all of them have to call this with the same arguments and a reader on a mesh of all their
    devices. All get the same report.

    Args:
      reader: model to evaluate.
      records: documents, with random access.
      control: replacement of the images.
      unseen_fonts: fonts that get a row of their own.
      limit: maximum number of questions.
      max_new_tokens: maximum length of an answer. A longer answer is truncated, and counts as wrong.
      title: title of the progress bar.
      seed: seed for the choice of wrong images.

    Raises:
      UserError: if there are no questions, or the control does not support the data.
    """
    start_time = time.monotonic()
    if control == "wrong":
        # Wrong pages come from all documents, including those beyond the limit.
        all_documents = list(_documents(records))
        if any(document.turns is not None for document in all_documents):
            raise UserError(
                "control 'wrong' needs documents with one image and does not support conversations; use 'blank'"
            )
        families = [document.family for document in all_documents]
        image_documents = [all_documents[other] for other in derangement(families, seed)]
        documents = _first_questions(all_documents, limit)
    else:
        documents = image_documents = _first_questions(_documents(records), limit)
    # Images are decoded and cut group by group, because all of them may not fit in memory. The prompts about one page
    # are in one group, even if they come from several records, so that the model encodes the page once.
    answers: dict[int, list[Answer]] = {}
    pages = [document.page for document in image_documents[: len(documents)]]
    total = sum(len(document.questions) for document in documents)
    show = distributed.is_primary()
    with progress_bar(desc=title, total=total, unit="question", leave=None, show=show) as progress:
        for group in group_by_page(pages, _DOCUMENTS_AT_ONCE):
            prompts = _prompts(reader, records, [(documents[i], image_documents[i]) for i in group], control == "blank")
            # Answers come in the order of the prompts.
            predictions = iter(reader.answer(prompts, max_new_tokens=max_new_tokens, on_batch=progress.update))
            for i in group:
                answers[i] = [
                    _answer(documents[i], *texts, next(predictions))
                    for texts in zip(documents[i].questions, documents[i].answers, strict=True)
                ]
    in_order = [answer for i in range(len(documents)) for answer in answers[i]]
    return Report(in_order, unseen_fonts, control, time.monotonic() - start_time)


@ordinary_modes()
def evaluate_checkpoint(
    checkpoint: str | pathlib.Path,
    *,
    data: str | None = None,
    split: str = "heldout",
    control: Control = "none",
    limit: int | None = None,
    batch_size: int = 32,
    views: int = 1,
    json_file: str | None = None,
    predictions_file: str | None = None,
    mesh: MeshConfig | None = None,
    metrics: Sequence[str] = ("exact",),
    show_wrong: int = 0,
    max_new_tokens: int = 32,
) -> Report:
    """Scores a checkpoint, prints the table, and writes the requested files (`alignvlm eval`).

    Args:
      checkpoint: checkpoint as for `inference.reader.load`.
      data: folder of a data set. The default is the data set of the run's last stage; exported folders have none.
      split: split of the data set.
      control: replacement of the images.
      limit: maximum number of questions.
      batch_size: number of questions decoded at once.
      views: number of views of each image (see `inference/views.py`).
      json_file: file for the scores.
      predictions_file: file for the answers, as JSON lines.
      mesh: device mesh. By default, one process uses its first device, and several processes shard the weights over
        all devices (`fsdp`).
      metrics: names in `answer_metrics.METRICS`. The first one decides which answers are wrong.
      show_wrong: maximum number of wrong answers to print.
      max_new_tokens: maximum length of an answer.

    Raises:
      UserError: if the data set is not given or not found, or a metric is unknown.
    """
    check_metrics(metrics)
    arguments = dict(data=data, split=split, control=control, limit=limit, batch_size=batch_size, mesh=mesh)
    arguments |= dict(max_new_tokens=max_new_tokens)
    settings = {"checkpoint": checkpoint, "views": views, **arguments}
    # Processes with different arguments would wait for each other forever.
    distributed.require_equal({name: str(value) for name, value in settings.items()})
    # Sharding over all devices fits the weights of any run, however it was trained.
    if mesh is None and jax.process_count() > 1:
        mesh = MeshConfig(data=1, fsdp=-1)
    # Loading the model takes long, so the checkpoint, the data and the output files are checked first.
    for file in filter(None, (json_file, predictions_file)):
        check_writable(file)
    check_distinct(json=json_file, predictions=predictions_file)
    model, step = locate(checkpoint)
    if step is None and not data:
        raise UserError(f"{checkpoint}: an exported folder has no data set; name one with --data")
    folder = open_location(data) if data else dataset_folder(read_run_config(checkpoint))
    if not data and not folder.exists():
        raise UserError(
            f"{folder}: the data set that {checkpoint} was trained on is missing; name one with --data. "
            + describe_no_dataset(folder)
        )
    records = store.open_dataset(folder, split)
    # Take the lease before the model is loaded, so that a second run is refused before its work.
    has_writer = predictions_file and not is_stream(predictions_file)
    with one_writer_of(predictions_file, beside=True) if has_writer else contextlib.nullcontext():
        reader = load(checkpoint, batch_size=batch_size, mesh=mesh and make_mesh(mesh)).with_views(views)
        report = evaluate(
            reader,
            records,
            control=control,
            unseen_fonts=(HELD_OUT_FONT,),
            limit=limit,
            max_new_tokens=max_new_tokens,
            title=split,
        )
        if predictions_file and distributed.is_primary():
            write_predictions(report, predictions_file, metrics)
    # All processes have the report; only the primary one prints and writes it.
    if not distributed.is_primary():
        return report
    shown = {"none": "the page itself", "blank": "a blank page", "wrong": "another page of its family"}[control]
    views_note = f", {views} views per image" if views > 1 else ""
    model_name = str(model) if step is None else f"{model}, step {step}"
    print(f"{model_name}: split {split!r} of {folder}, every question with {shown}{views_note}\n")
    print(format_scores(report, metrics))
    if warnings := format_counts(report.warnings, len(report.answers)):
        print(f"\nwarnings: {warnings}")
    warn_untrained(reader.training)
    figures = {"checkpoint": str(model), "step": step, "data": str(folder), "split": split, "views": views}
    figures |= {**report.to_json(), "metrics": scores_to_json(report, metrics)}
    if show_wrong:
        print("\n" + wrong_answers.show(report, records, metrics[0], show_wrong, predictions_file))
    if json_file:
        write_json(figures, json_file)
    return report


def dataset_folder(config: ExperimentConfig) -> pathlib.Path:
    """Returns the folder of the data set that the run's last stage is trained on."""
    return join(config.data.root, config.stages[-1].mixture[0].dataset)


def derangement(families: Sequence[str], seed: int) -> list[int]:
    """Returns for each document the index of another one of its family.

    before: families = [form, form, table, form, table]
    after:  [3, 0, 4, 1, 2]

    Raises:
      UserError: if a family has only one document.
    """
    # Each family is shuffled into a ring, in which every document gets its neighbor's index.
    rng = np.random.default_rng(seed)
    others = [-1] * len(families)
    for family in sorted(set(families)):
        ring = rng.permutation([i for i, name in enumerate(families) if name == family])
        if len(ring) < 2:
            raise UserError(f"control 'wrong' needs two documents of each family, got only one {family!r}")
        for document, other in zip(ring, np.roll(ring, 1), strict=True):
            others[document] = int(other)
    return others


def write_predictions(report: Report, file: str | pathlib.Path, metrics: Sequence[str] = ()) -> None:
    """Writes one JSON line per question, with the score of the answer by each metric other than exact match."""
    others = [name for name in metrics if name != "exact"]
    with open_atomically(file) as out:
        for answer in report.answers:
            fields = {name: getattr(answer, name) for name in answer.__dataclass_fields__ if name != "record"}
            fields |= {"right": answer.is_right, **({"scores": answer_scores(answer, others)} if others else {})}
            out.write(json.dumps(fields, ensure_ascii=False) + "\n")


def write_json(figures: Mapping[str, Any], file: str | pathlib.Path) -> None:
    """Writes numbers and settings as JSON."""
    with open_atomically(file) as out:
        json.dump(figures, out, indent=2, ensure_ascii=False)
        out.write("\n")


@dataclasses.dataclass(frozen=True)
class _Document:
    """A record without its images.

    Attributes:
      index: index of the record.
      id: id of the document.
      family: family of the document, or source of the conversation.
      font: font of the document.
      questions: questions about the document.
      answers: expected answers.
      page: digest of the encoded images; empty without images.
      turns: messages up to and including each question, for a conversation; None for a document.
    """

    index: int
    id: str
    family: str
    font: str
    questions: list[str]
    answers: list[str]
    page: bytes
    turns: list[list[Message]] | None = None


def _documents(records: Sequence[Record]) -> Iterator[_Document]:
    """Yields the documents that have questions, without their images, which may not all fit in memory."""
    for index in range(len(records)):
        record = records[index]
        if "conversation" in record:
            yield _conversation(index, record)
        elif "questions" not in record:
            raise UserError(
                f"cannot score records with the fields {', '.join(record)}: expected documents (id, source, font, "
                "image, questions, answers) or records of `alignvlm prepare` (id, source, conversation, images)"
            )
        elif record["questions"]:
            names, texts = ("id", "source", "font"), (record["questions"], record["answers"])
            yield _Document(index, *(record[name] for name in names), *texts, digest_images([record["image"]]))


def _conversation(index: int, record: Record) -> _Document:
    """Returns a document with a question for each turn of the assistant."""
    messages = make_conversation(record, "conversation", np.random.default_rng(0)).messages
    answer_indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return _Document(
        index,
        record["id"],
        record["source"],
        font="",
        questions=[_text(messages[i - 1]) for i in answer_indices],
        answers=[_text(messages[i]) for i in answer_indices],
        page=digest_images(record["images"]),
        turns=[messages[:i] for i in answer_indices],
    )


def _text(message: Message) -> str:
    # The content is a string or a list of parts. Only text parts have the key "text".
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _first_questions(documents: Iterable[_Document], limit: int | None) -> list[_Document]:
    """Returns the documents that contain the first `limit` questions, and does not read further documents."""
    selected, remaining = [], sys.maxsize if limit is None else limit
    for document in documents:
        # The last document may keep only some of its questions.
        kept = {name: getattr(document, name)[:remaining] for name in ("questions", "answers")}
        turns = document.turns and document.turns[:remaining]
        selected.append(dataclasses.replace(document, **kept, turns=turns))
        remaining -= len(selected[-1].questions)
        if not remaining:
            break
    if not selected:
        raise UserError("no questions to ask: the split is empty, or its documents have no questions")
    return selected


def _prompts(
    reader: Reader, records: Sequence[Record], pairs: Sequence[tuple[_Document, _Document]], blank: bool
) -> list[Prompt]:
    """Returns prompts for the questions about documents.

    Args:
      reader: the model.
      records: all records.
      pairs: each document with the one whose images are shown. Documents with the same images are adjacent.
      blank: whether white pages are shown.
    """
    prompts = []
    for (_, is_conversation), same_page in itertools.groupby(
        pairs, key=lambda pair: (pair[1].page, pair[0].turns is not None)
    ):
        documents, image_documents = zip(*same_page, strict=True)
        record = records[image_documents[0].index]
        if not is_conversation:
            # One call cuts the page once, also for several records.
            page = _open_image(record["image"], image_documents[0].id, blank)
            prompts += reader.prompts(page, [question for document in documents for question in document.questions])
        else:
            prompts += _conversation_prompts(reader, record, documents, blank)
    return prompts


def _conversation_prompts(
    reader: Reader, record: Record, documents: Sequence[_Document], blank: bool
) -> Iterator[Prompt]:
    """Yields the prompts of conversations that show the images of a record."""
    cut_images = None
    for document in documents:
        try:
            if cut_images is None:
                cut_images = [reader.cut(_open_image(data, "image", blank)) for data in record["images"]]
            # The prompt of a turn has only the images shown up to that turn.
            yield from (reader.chat_prompt(turns, cut_images[: _count_images(turns)]) for turns in document.turns)
        except UserError as error:
            raise UserError(f"{document.id}: {error}") from error


def _answer(document: _Document, question: str, expected: str, predicted: AnswerText) -> Answer:
    """Returns an answer to a question about a document, next to the expected one."""
    where = document.id, document.family, document.font
    return Answer(*where, question, expected, str(predicted), tuple(predicted.warnings), document.index)


def _open_image(data: bytes, name: str, blank: bool) -> PIL.Image.Image:
    """Decodes an image, or returns a white one of its size."""
    image = images.open_image(data, name=name)
    return PIL.Image.new("RGB", image.size, "white") if blank else image


def _count_images(messages: Sequence[Message]) -> int:
    # Content that is a plain string has no images.
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)
