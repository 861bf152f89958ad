"""Score a reader on documents: free greedy decoding, exact match, and controls that an honest reader fails.

Controls replace the images and leave questions and answers alone:

    none    the page itself
    blank   a white page of the same size: what the questions alone give away
    wrong   another document's page of the same family: what the family's layout and usual values give away

Conversations as `tools/prepare_data.py` writes them are scored likewise: each of the assistant's turns is an answer to
be given, after the turns before it as they are written. Of controls they know `blank`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO

import jax
import numpy as np
import PIL.Image
from tqdm import tqdm

from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data import images, store
from alignvlm_jax.data.chat import Message
from alignvlm_jax.data.conversations import make_conversation
from alignvlm_jax.data.synthetic import HELD_OUT_FONT
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.identity import locate
from alignvlm_jax.evaluation.report import Answer, Report, format_table
from alignvlm_jax.inference.generate import Prompt
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh

Control = Literal["none", "blank", "wrong"]
Record = Mapping[str, Any]
"""As `data/store.py` gives it. A document: id, source (its family), font, image (encoded), questions, answers; or what
`tools/prepare_data.py` writes: id, source, conversation, images."""

# Pages in memory at a time: enough to fill batches with prompts of like size, few enough for large pages.
_DOCUMENTS_AT_ONCE = 64


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
    """Asks every question of every document and counts the exact answers.

    With several processes all ask the same, of a reader on a mesh of all their devices, and get the same report.

    Args:
      reader: the model.
      records: the documents, with random access.
      control: what to do with the images.
      unseen_fonts: fonts that get a row of their own.
      limit: ask only the first so many questions.
      max_new_tokens: where an answer that does not end is cut off; it is wrong then anyway.
      title: of the progress bar.
      seed: of the choice of wrong images.
    """
    started = time.monotonic()
    if control == "wrong":
        # Chosen among all documents, asked about or not.
        everything = list(_documents(records))
        if any(document.turns is not None for document in everything):
            raise UserError("control 'wrong' is for documents with one image, not for conversations: take 'blank'")
        shown = [everything[other] for other in derangement([document.family for document in everything], seed)]
        documents = _first_questions(everything, limit)
    else:
        documents = shown = _first_questions(_documents(records), limit)
    answers = []
    total = sum(len(document.questions) for document in documents)
    quiet = not distributed.is_primary()
    with tqdm(total=total, desc=title, unit="question", dynamic_ncols=True, leave=None, disable=quiet) as progress:
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            group = range(start, min(start + _DOCUMENTS_AT_ONCE, len(documents)))
            prompts = []
            for i in group:
                prompts += _prompts(reader, records, documents[i], shown[i], blank=control == "blank")
            predictions = iter(reader.answer(prompts, max_new_tokens=max_new_tokens, on_batch=progress.update))
            for document in documents[group.start : group.stop]:
                for question, expected in zip(document.questions, document.answers, strict=True):
                    predicted = next(predictions)
                    answers.append(Answer(document.id, document.family, document.font, question, expected, predicted))
    return Report(answers, unseen_fonts, control, time.monotonic() - started)


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
) -> Report:
    """`alignvlm eval`: scores a checkpoint, prints the table, writes the files asked for.

    Args:
      checkpoint: as `inference.reader.load` takes it.
      data: the folder of a data set; None is the one that the run's last stage trained on, and for runs only.
      split: which of its splits.
      control: what to do with the images.
      limit: ask only the first so many questions.
      batch_size: questions decoded at once.
      views: how often each image is looked at (`inference/views.py`).
      json_file: for the figures.
      predictions_file: for the answers, as JSON lines.
      mesh: how to lie on all devices. None is the first device alone in one process, and with several `fsdp` over all:
        whatever the run was trained on, that holds the weights.
    """
    arguments = dict(data=data, split=split, control=control, limit=limit, batch_size=batch_size, mesh=mesh)
    asked = {"checkpoint": checkpoint, "views": views, **arguments}
    distributed.require_equal({name: str(value) for name, value in asked.items()})
    if mesh is None and jax.process_count() > 1:
        mesh = MeshConfig(data=1, fsdp=-1)
    model, step = locate(checkpoint)
    if step is None and not data:
        raise UserError(f"{checkpoint}: an exported folder has no data set of its own: name one with --data")
    folder = pathlib.Path(data) if data else dataset_folder(read_run_config(checkpoint))
    if not data and not folder.exists():
        raise UserError(f"{folder}, which {checkpoint} was trained on, is not here: name the data set with --data")
    records = store.open_dataset(folder, split)
    reader = load(checkpoint, batch_size=batch_size, mesh=mesh and make_mesh(mesh)).with_views(views)
    report = evaluate(reader, records, control=control, unseen_fonts=(HELD_OUT_FONT,), limit=limit, title=split)
    if not distributed.is_primary():
        return report
    shown = {"none": "the page itself", "blank": "a blank page", "wrong": "another page of its family"}[control]
    times = f", looked at {views} times" if views > 1 else ""
    which = str(model) if step is None else f"{model}, step {step}"
    print(f"{which}: split {split!r} of {folder}, every question with {shown}{times}\n")
    print(format_table({"exact match": report}))
    figures = {"checkpoint": str(model), "step": step, "data": str(folder), "split": split, "views": views}
    figures |= report.to_json()
    if json_file:
        write_json(figures, json_file)
    if predictions_file:
        write_predictions(report, predictions_file)
    return report


def dataset_folder(config: ExperimentConfig) -> pathlib.Path:
    """Where the data set lies that the run's last stage is trained on."""
    return pathlib.Path(config.data.root) / config.stages[-1].mixture[0].dataset


def derangement(families: Sequence[str], seed: int) -> list[int]:
    """For each document another one of its family: each family shuffled into a ring, and everyone takes the next.

    before: families = [form, form, table, form, table]
    after:  [3, 0, 4, 1, 2]
    """
    rng = np.random.default_rng(seed)
    others = [-1] * len(families)
    for family in sorted(set(families)):
        ring = rng.permutation([i for i, name in enumerate(families) if name == family])
        if len(ring) < 2:
            raise UserError(f"control 'wrong' needs two documents of each family, and there is one {family!r} only")
        for document, other in zip(ring, np.roll(ring, 1), strict=True):
            others[document] = int(other)
    return others


def write_predictions(report: Report, file: str | pathlib.Path) -> None:
    """One JSON line a question."""
    with _open_for_writing(file) as out:
        for answer in report.answers:
            fields = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
            out.write(json.dumps({**fields, "right": answer.is_right}, ensure_ascii=False) + "\n")


def write_json(figures: Mapping[str, Any], file: str | pathlib.Path) -> None:
    """Figures as JSON."""
    with _open_for_writing(file) as out:
        json.dump(figures, out, indent=2, ensure_ascii=False)
        out.write("\n")


@dataclasses.dataclass(frozen=True)
class _Document:
    """A record without its image, and its place among the records."""

    index: int
    id: str
    family: str
    font: str
    questions: list[str]
    answers: list[str]
    turns: list[list[Message]] | None = None
    """Of a conversation: what was said before each answer, its question at the end."""


def _documents(records: Sequence[Record]) -> Iterator[_Document]:
    """The documents that have questions; their images stay where they are, they may not fit in memory."""
    for index in range(len(records)):
        record = records[index]
        if "conversation" in record:
            yield _conversation(index, record)
        elif "questions" not in record:
            raise UserError(
                f"these records have {', '.join(record)}: what can be scored are documents (id, source, font, image, "
                "questions, answers) and what tools/prepare_data.py writes (id, source, conversation, images)"
            )
        elif record["questions"]:
            yield _Document(
                index, record["id"], record["source"], record["font"], record["questions"], record["answers"]
            )


def _conversation(index: int, record: Record) -> _Document:
    messages = make_conversation(record, "conversation", np.random.default_rng(0)).messages
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return _Document(
        index,
        record["id"],
        record["source"],
        font="",
        questions=[_text(messages[i - 1]) for i in places],
        answers=[_text(messages[i]) for i in places],
        turns=[messages[:i] for i in places],
    )


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _first_questions(documents: Iterable[_Document], limit: int | None) -> list[_Document]:
    """The documents up to the question number `limit`; no more are read than that takes."""
    chosen, left = [], sys.maxsize if limit is None else limit
    for document in documents:
        kept = {name: getattr(document, name)[:left] for name in ("questions", "answers")}
        turns = document.turns and document.turns[:left]
        chosen.append(dataclasses.replace(document, **kept, turns=turns))
        left -= len(chosen[-1].questions)
        if not left:
            break
    if not chosen:
        raise UserError("there are no questions to ask: the split is empty, or its documents have none")
    return chosen


def _prompts(
    reader: Reader, records: Sequence[Record], document: _Document, shown: _Document, *, blank: bool
) -> list[Prompt]:
    """What the model is asked about a document, with the images of `shown`."""
    record = records[shown.index]
    if document.turns is None:
        return reader.prompts(_picture(record["image"], shown.id, blank), document.questions)
    try:
        cut = [reader.cut(_picture(data, "image", blank)) for data in record["images"]]
        return [reader.chat_prompt(turns, cut[: _count_images(turns)]) for turns in document.turns]
    except UserError as error:
        raise UserError(f"{document.id}: {error}") from error


def _picture(data: bytes, name: str, blank: bool) -> PIL.Image.Image:
    image = images.open_image(data, name=name)
    return PIL.Image.new("RGB", image.size, "white") if blank else image


def _count_images(messages: Sequence[Message]) -> int:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


@contextlib.contextmanager
def _open_for_writing(file: str | pathlib.Path) -> Iterator[TextIO]:
    """A file that takes its name only once all of it is written."""
    file = pathlib.Path(file)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as out:
            yield out
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
