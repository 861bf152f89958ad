"""mPLUG's DocDownstream-1.0: eight of the paper's benchmarks in one format, with the official references beside.

    test/DocVQA_test.jsonl           {"image": ["./imgs/DUE_Benchmark/DocVQA/pngs/rnbx0223_193.png"],
    val.jsonl (all data sets)         "messages": [{"role": "user", "content": "<|image|>What is the date?"},
    imgs/...                                       {"role": "assistant", "content": "1/8/93"}],
                                      "task_name": "qa_sft", "dataset_name": "DocVQA"}
    meta/DocVQA/test/metadata.jsonl  line by line the documents and questions of test/DocVQA_test.jsonl:
                                     {"file_name": "pngs/rnbx0223_193.pdf_0.png",
                                      "ground_truth": "{\\"gt_parses\\": [{\\"question\\": ..., \\"answer\\": ...}]}"}
    meta/DocVQA/test/document.jsonl  DUE's references: {"name": "rnbx0223_193", "annotations": [
                                      {"key": "What is the date?", "values": [
                                       {"value": "1/8/93", "value_variants": ["1/8/93", "1-8-93"]}]}]}
    meta/TextVQA/TextVQA_0.5.1_val.json

The answers in the messages are one of those that count, so scores by them alone are too low for benchmarks that accept
several; `meta` has all. Where it lacks, the messages' answer is used, and `Question.extra` says so.
Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5: README, docowl_benchmark_evaluate.py, evaluation/due_benchmarks_eval.py.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import files
from alignvlm_jax.evaluation.benchmarks.files import Row
from alignvlm_jax.evaluation.benchmarks.layout import Layout, split_names
from alignvlm_jax.evaluation.benchmarks.question import Question

IMAGE_MARK = "<|image|>"
ONE_REFERENCE = "one reference a question: the folder meta/ is not there"
"""What `Question.extra` says where all accepted answers are not at hand."""

_EXPECTED = "DIR/{split}/{dataset}_{split}.jsonl or DIR/{split}.jsonl, DIR/imgs/..."
_EXPECTED_OF_DUE = ", and for all accepted answers DIR/meta/{dataset}/{split}/metadata.jsonl and document.jsonl"
_EXPECTED_OF_TEXTVQA = ", and DIR/meta/TextVQA/TextVQA_0.5.1_{split}.json"

# What the two data sets of forms ask for. The key is found in the question: "What is the value for the gross_amount?".
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
_ABSENT = "None"  # How the messages answer for a key that the document has no value for.


def layout(dataset: str) -> Layout:
    """DocDownstream's layout of one of its data sets, by its name there."""
    expected = _EXPECTED
    if dataset in _WITH_DUE_REFERENCES:
        expected += _EXPECTED_OF_DUE
    if dataset == "TextVQA":
        expected += _EXPECTED_OF_TEXTVQA
    return Layout(
        "DocDownstream-1.0 (mPLUG/DocDownstream-1.0)",
        expected.replace("{dataset}", dataset),
        functools.partial(_read, dataset),
    )


def _read(dataset: str, folder: pathlib.Path, split: str) -> Iterable[Question] | None:
    own = files.find(folder, f"{split}/{dataset}_{split}.jsonl")
    found = own or files.find(folder, f"{split}.jsonl")
    if not found or not own and not _mentions(found[0], dataset):
        return None
    make = functools.partial(_question, dataset, folder)
    asked = list(files.questions(files.json_lines(found[0]), make))
    if not own:
        # A damaged line of the file of all data sets may be of any: it is no question of this one.
        asked = [question for question in asked if not question.problem or question.document]
    if dataset in _WITH_DUE_REFERENCES:
        return _with_due_references(asked, dataset, folder, split)
    if dataset == "TextVQA":
        return _with_ten_answers(asked, folder, split)
    return asked


def _mentions(file: pathlib.Path, dataset: str) -> bool:
    """Whether a file of all data sets has this one, or says of none which it is of."""
    return any(
        isinstance(record, dict) and record.get("dataset_name") == dataset for record, _ in files.json_lines(file)
    )


def _question(dataset: str, folder: pathlib.Path, row: Row) -> Question | None:
    if row.fields.get("dataset_name", dataset) != dataset:
        return None
    line = row.where.rpartition(" ")[2]
    question = Question(id=f"{dataset}:{line}", where=row.where, document=row.where)
    try:
        return _complete(question, dataset, folder, row)
    except UserError as error:
        return dataclasses.replace(question, problem=str(error))


def _complete(question: Question, dataset: str, folder: pathlib.Path, row: Row) -> Question:
    messages = row.get("messages")
    roles = (
        [message.get("role") for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    )
    if roles[:2] != ["user", "assistant"]:
        raise UserError(f"{row.where}: 'messages' must be a user's question and an assistant's answer, not {roles}")
    asked, answer = (Row(message, row.where).text("content") for message in messages[:2])
    answer = row.text("gt_answer") if "gt_answer" in row else answer
    images = row.texts("image")
    text = asked.replace(IMAGE_MARK, "").strip()
    if not text:
        raise UserError(f"{row.where}: the question is empty")
    key = _key_in(text, dataset)
    return dataclasses.replace(
        question,
        text=text,
        images=tuple(folder / image for image in images),
        references=(answer,),
        # One document of a form data set is what shares an image, unless meta/ names it.
        document=images[0] if images else "",
        group=key,
        values=() if answer.strip() == _ABSENT else ((answer,),),
        extra=ONE_REFERENCE if dataset in _WITH_DUE_REFERENCES else None,
    )


def _key_in(text: str, dataset: str) -> str:
    """The key that a question about a form asks for, by which its value is scored; "" in other data sets."""
    if dataset not in KEYS:
        return ""
    return next((key for key in KEYS[dataset] if key in text), text)


def _with_due_references(asked: list[Question], dataset: str, folder: pathlib.Path, split: str) -> list[Question]:
    metas = [folder / "meta" / dataset / name for name in split_names(split)]
    meta = next((path for path in metas if (path / "document.jsonl").is_file()), None)
    if meta is None:
        return asked
    references = dict(_due_references(meta / "document.jsonl"))
    lines = list(files.json_lines(meta / "metadata.jsonl")) if (meta / "metadata.jsonl").is_file() else []
    if len(lines) != len(asked):
        raise UserError(
            f"{meta / 'metadata.jsonl'} has {len(lines)} lines for the {len(asked)} questions of {dataset}'s {split}: "
            f"they belong together line by line, so one of them is incomplete (without {meta} the one answer in the "
            "questions' file is used)"
        )
    matched = [
        _match(question, record, where, dataset, references)
        for question, (record, where) in zip(asked, lines, strict=True)
    ]
    if dataset in KEYS:
        # The official score counts every value of every document, asked for or not.
        seen = {(question.document, question.group) for question in matched}
        matched += [
            Question(
                id=f"{dataset}:{name}:{key}",
                where=f"{meta / 'document.jsonl'}: {name}",
                document=name,
                group=key,
                values=values,
                problem=f"a value of {key!r} is expected of {name!r}, which no question asks for",
            )
            for (name, key), values in references.items()
            if values and (name, key) not in seen
        ]
    return matched


def _match(question: Question, record: Any, where: str, dataset: str, references: dict) -> Question:
    """The question with the references that its line of metadata.jsonl leads to."""
    try:
        row = Row(record, where)
        name = row.text("file_name").split("/")[-1].split(".pdf")[0]
        name = name.removesuffix(".png").removesuffix(".jpg")  # where no .pdf is in it
        asked = Row(json.loads(row.text("ground_truth"))["gt_parses"][0], where).text("question")
    except (UserError, ValueError, LookupError, TypeError) as error:
        return dataclasses.replace(
            question, problem=question.problem or f"{where}: no document and question in it ({error})"
        )
    key = _key_in(asked, dataset)
    values = references.get((name, key or asked), ())
    if dataset in KEYS:
        return dataclasses.replace(question, document=name, group=key, values=values, extra=None)
    if not values:
        return dataclasses.replace(question, problem=question.problem or f"{where}: document.jsonl has no answer to it")
    accepted = tuple(dict.fromkeys(itertools.chain.from_iterable(values)))
    if dataset == "WikiTableQuestions":
        accepted = tuple(spellings[0] for spellings in values)  # All of them, not any of them.
    return dataclasses.replace(question, document=name, references=accepted, extra=None)


def _due_references(file: pathlib.Path) -> Iterator[tuple[tuple[str, str], tuple[tuple[str, ...], ...]]]:
    """(document, key) -> for each value its accepted spellings."""
    for record, where in files.json_lines(file):
        if isinstance(record, UserError):
            raise record
        document = Row(record, where)
        for annotation in document.get("annotations"):
            entry = Row(annotation, where)
            values = []
            for value in entry.get("values"):
                value = Row(value, where)
                variants = value.texts("value_variants") if "value_variants" in value else ()
                values.append(tuple(dict.fromkeys((value.text("value"), *variants))))
            yield (document.text("name"), entry.text("key")), tuple(values)


def _with_ten_answers(asked: list[Question], folder: pathlib.Path, split: str) -> list[Question]:
    """TextVQA's questions with the ten people's answers, from the original file in meta/."""
    file = folder / "meta" / "TextVQA" / f"TextVQA_0.5.1_{split}.json"
    if not file.is_file():
        raise UserError(
            f"{file} is not there: TextVQA's score needs the answers of ten people, and the questions' file has one "
            "(it is the original TextVQA_0.5.1 file; put it there)"
        )
    data = files.json_file(file)
    rows = [Row(*record) for record in files.records(data.get("data") if isinstance(data, dict) else data, str(file))]
    originals = {(row.text("image_id"), row.text("question")): row for row in rows}
    completed = []
    for question in asked:
        if question.problem:
            completed.append(question)
            continue
        row = originals.get((question.images[0].stem, question.text))
        if row is None:
            completed.append(
                dataclasses.replace(
                    question, problem=f"{question.where}: {file.name} has no such question of that image"
                )
            )
        else:
            answers = row.texts("answers") if "answers" in row else None
            completed.append(dataclasses.replace(question, id=row.text("question_id"), references=answers))
    return completed
