r"""Reader of mPLUG's DocDownstream-1.0: eight of the paper's benchmarks in one format, with the official references.

    test/DocVQA_test.jsonl           {"image": ["./imgs/DUE_Benchmark/DocVQA/pngs/rnbx0223_193.png"],
    val.jsonl (all data sets)         "messages": [{"role": "user", "content": "<|image|>What is the date?"},
    imgs/...                                       {"role": "assistant", "content": "1/8/93"}],
                                      "task_name": "qa_sft", "dataset_name": "DocVQA"}
    meta/DocVQA/test/metadata.jsonl  document and question of each line of test/DocVQA_test.jsonl:
                                     {"file_name": "pngs/rnbx0223_193.pdf_0.png",
                                      "ground_truth": "{\"gt_parses\": [{\"question\": ..., \"answer\": ...}]}"}
    meta/DocVQA/test/document.jsonl  DUE's references: {"name": "rnbx0223_193", "annotations": [
                                      {"key": "What is the date?", "values": [
                                       {"value": "1/8/93", "value_variants": ["1/8/93", "1-8-93"]}]}]}
    meta/TextVQA/TextVQA_0.5.1_val.json

A message contains only one of the accepted answers, so scores against it are too low for benchmarks that accept
several. The folder meta/ has all accepted answers. Without it, the answer in the messages is used, with a remark in
`Question.extra`.
Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5: README, docowl_benchmark_evaluate.py, evaluation/due_benchmarks_eval.py.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Found, Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

IMAGE_MARK = "<|image|>"
IMAGES_FOLDER = "imgs"
ONE_REFERENCE = "one reference per question: the folder meta/ is missing"
"""Remark in `Question.extra` if only one of the accepted answers is known."""

_EXPECTED = "DIR/{split}/{dataset}_{split}.jsonl or DIR/{split}.jsonl, DIR/imgs/..."
_EXPECTED_DUE_META = ", and for all accepted answers DIR/meta/{dataset}/{split}/metadata.jsonl and document.jsonl"
_EXPECTED_TEXTVQA_META = ", and DIR/meta/TextVQA/TextVQA_0.5.1_{split}.json"

# Keys of the two data sets of forms. A question contains its key: "What is the value for the gross_amount?".
KEYS = {
    "DeepForm": ("advertiser", "flight_from", "flight_to", "gross_amount", "contract_num"),
    "KleisterCharity": (
        "address__post_town",
        "address__postcode",
        "address__street_line",
        "charity_name",
        "charity_number",
        "income_annually_in_british_pounds",
        "report_date",
        "spending_annually_in_british_pounds",
    ),
}
_WITH_DUE_REFERENCES = ("DocVQA", "InfographicsVQA", "WikiTableQuestions", *KEYS)
_ABSENT = "None"  # Answer in the messages if the document has no value for the key.


def layout(dataset: str) -> Layout:
    """Returns the layout of one of DocDownstream's data sets, by its name there."""
    expected = _EXPECTED
    if dataset in _WITH_DUE_REFERENCES:
        expected += _EXPECTED_DUE_META
    if dataset == "TextVQA":
        expected += _EXPECTED_TEXTVQA_META
    return Layout(
        "DocDownstream-1.0 (mPLUG/DocDownstream-1.0)",
        expected.replace("{dataset}", dataset),
        functools.partial(_read, dataset),
        images=(IMAGES_FOLDER,),
    )


def _read(dataset: str, folder: pathlib.Path, split: str) -> Found | None:
    own_files = files.find(folder, f"{split}/{dataset}_{split}.jsonl")
    paths = own_files or files.find(folder, f"{split}.jsonl")
    if not paths or not own_files and not _mentions(paths[0], dataset):
        return None
    # Either a file of this data set's own, or one of all data sets, whose other records `_question` skips.
    make = functools.partial(_question, dataset, folder)
    questions = list(files.questions(files.json_lines(paths[0]), make))
    if not own_files:
        # A damaged line in the shared file may belong to any data set, so it does not count for this one. `_question`
        # sets `document` in all questions of this data set.
        questions = [question for question in questions if not question.problem or question.document]
    if dataset in _WITH_DUE_REFERENCES:
        questions = _with_due_references(questions, dataset, folder, split)
    if dataset == "TextVQA":
        questions = _with_ten_answers(questions, folder, split)
    return Found(questions)


def _mentions(file: pathlib.Path, dataset: str) -> bool:
    """Returns whether a file of all data sets has a record of this one."""
    return any(
        isinstance(record, dict) and record.get("dataset_name") == dataset for record, _ in files.json_lines(file)
    )


def _question(dataset: str, folder: pathlib.Path, row: Row) -> Question | None:
    if row.fields.get("dataset_name", dataset) != dataset:
        return None
    line = row.where.rpartition(" ")[2]
    # `document` is set at once: it marks the question as one of this data set, even if the rest of it is damaged.
    question = Question(id=f"{dataset}:{line}", where=row.where, document=row.where)
    try:
        return _fill(question, dataset, folder, row)
    except UserError as error:
        return dataclasses.replace(question, problem=str(error))


def _fill(question: Question, dataset: str, folder: pathlib.Path, row: Row) -> Question:
    """Returns the question with text, images and the messages' answer.

    Raises:
      UserError: if the row is incomplete.
    """
    messages = row.get("messages")
    roles = (
        [message.get("role") for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    )
    if roles[:2] != ["user", "assistant"]:
        raise UserError(f"{row.where}: expected 'messages' of a user and then an assistant, got the roles {roles}")
    content, answer = (Row(message, row.where).text("content") for message in messages[:2])
    # Some files also have the answer in a field of its own, which takes precedence.
    answer = row.text("gt_answer") if "gt_answer" in row else answer
    images = row.texts("image")
    text = content.replace(IMAGE_MARK, "").strip()
    if not text:
        raise UserError(f"{row.where}: the question is empty")
    key = _key_in(text, dataset)
    return dataclasses.replace(
        question,
        text=text,
        images=tuple(folder / image for image in images),
        references=(answer,),
        # Questions on one image belong to one document, unless meta/ names the document.
        document=images[0] if images else "",
        group=key,
        values=() if answer.strip() == _ABSENT else ((answer,),),
        extra=ONE_REFERENCE if dataset in _WITH_DUE_REFERENCES else None,
    )


def _key_in(text: str, dataset: str) -> str:
    """Returns the key that a question about a form asks for, or the question if it has none; "" for other data sets."""
    if dataset not in KEYS:
        return ""
    return next((key for key in KEYS[dataset] if key in text), text)


def _with_due_references(questions: list[Question], dataset: str, folder: pathlib.Path, split: str) -> list[Question]:
    """Returns the questions with all accepted answers from meta/, or unchanged if meta/ is missing."""
    metas = [folder / "meta" / dataset / name for name in split_names(split)]
    meta = next((path for path in metas if (path / "document.jsonl").is_file()), None)
    if meta is None:
        return questions
    references = dict(_due_references(meta / "document.jsonl"))
    # metadata.jsonl names document and question of each line of the file of questions.
    lines = list(files.json_lines(meta / "metadata.jsonl")) if (meta / "metadata.jsonl").is_file() else []
    if len(lines) != len(questions):
        raise UserError(
            f"{meta / 'metadata.jsonl'}: {len(lines)} lines for the {len(questions)} questions of {dataset} {split}. "
            "The two files correspond line by line, so one of them is incomplete. Fetch it again, or remove "
            f"{meta} to score against the one answer in the file of questions"
        )
    matched = [
        _match(question, record, where, dataset, references)
        for question, (record, where) in zip(questions, lines, strict=True)
    ]
    if dataset in KEYS:
        # The official score counts every value of every document, even if no question asks for it.
        seen = {(question.document, question.group) for question in matched}
        matched += [
            Question(
                id=f"{dataset}:{name}:{key}",
                where=f"{meta / 'document.jsonl'}: {name}",
                document=name,
                group=key,
                values=values,
                is_published=False,
                problem=f"no question asks for {key!r} of document {name!r}, which has a value for it",
            )
            for (name, key), values in references.items()
            if values and (name, key) not in seen
        ]
    return matched


def _match(question: Question, record: Any, where: str, dataset: str, references: dict) -> Question:
    """Returns the question with the references that its line of metadata.jsonl points to.

    Args:
      question: question from the messages.
      record: its line of metadata.jsonl.
      where: location of that line.
      dataset: name of the data set.
      references: accepted spellings of each value by (document, key); see `_due_references`.
    """
    try:
        row = Row(record, where)
        name = row.text("file_name").split("/")[-1].split(".pdf")[0]
        name = name.removesuffix(".png").removesuffix(".jpg")  # For names without ".pdf".
        text = Row(json.loads(row.text("ground_truth"))["gt_parses"][0], where).text("question")
    except (UserError, ValueError, LookupError, TypeError) as error:
        return dataclasses.replace(
            question, problem=question.problem or f"{where}: document and question cannot be read ({error})"
        )
    key = _key_in(text, dataset)
    # DUE files a value under the key of a form, or else under the question itself.
    values = references.get((name, key or text), ())
    if dataset in KEYS:
        return dataclasses.replace(question, document=name, group=key, values=values, extra=None)
    if not values:
        return dataclasses.replace(
            question, problem=question.problem or f"{where}: document.jsonl has no answer to this question"
        )
    accepted = tuple(dict.fromkeys(itertools.chain.from_iterable(values)))
    if dataset == "WikiTableQuestions":
        # An answer must contain all values, so each value is a reference of its own, in its first spelling.
        accepted = tuple(spellings[0] for spellings in values)
    return dataclasses.replace(question, document=name, references=accepted, extra=None)


def _due_references(file: pathlib.Path) -> Iterator[tuple[tuple[str, str], tuple[tuple[str, ...], ...]]]:
    """Yields pairs of (document, key) and the accepted spellings of each value."""
    for record, where in files.json_lines(file):
        if isinstance(record, UserError):
            raise record
        document = Row(record, where)
        for annotation in document.get("annotations"):
            entry = Row(annotation, where)
            # The value itself is always the first of its spellings.
            values = []
            for value in entry.get("values"):
                value = Row(value, where)
                variants = value.texts("value_variants") if "value_variants" in value else ()
                values.append(tuple(dict.fromkeys((value.text("value"), *variants))))
            yield (document.text("name"), entry.text("key")), tuple(values)


def _with_ten_answers(questions: list[Question], folder: pathlib.Path, split: str) -> list[Question]:
    """Returns TextVQA's questions with the answers of ten people, from the original file in meta/."""
    file = folder / "meta" / "TextVQA" / f"TextVQA_0.5.1_{split}.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing. TextVQA's score needs the answers of ten people, and the file of questions has only "
            "one. Copy the original TextVQA_0.5.1 file there"
        )
    data = files.json_file(file)
    rows = [Row(*record) for record in files.records(data.get("data") if isinstance(data, dict) else data, str(file))]
    # The questions lack the ids of the original file, so image and text identify them.
    originals = {(row.text("image_id"), row.text("question")): row for row in rows}
    # Replace the id and the answer of each question with the original file's.
    completed = []
    for question in questions:
        if question.problem:
            completed.append(question)
            continue
        row = originals.get((question.images[0].stem, question.text))
        if row is None:
            completed.append(
                dataclasses.replace(
                    question, problem=f"{question.where}: {file.name} does not have this question on this image"
                )
            )
        else:
            answers = row.answers("answers")
            completed.append(dataclasses.replace(question, id=row.text("question_id"), references=answers))
    return completed
