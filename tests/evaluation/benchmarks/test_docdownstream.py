"""Tests of the reader of DocDownstream: lines, images, and the references in meta/."""

import json

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import summary
from tests.evaluation.benchmarks.stub import evaluate, write_image, write_json, write_lines


def line(dataset: str, image: str, question: str, answer: str) -> dict:
    """Returns a record with the fields of the real files."""
    return {
        "image": [image],
        "messages": [
            {"role": "user", "content": f"<|image|>{question}"},
            {"role": "assistant", "content": answer},
        ],
        "task_name": "ie_sft" if dataset in ("DeepForm", "KleisterCharity") else "qa_sft",
        "dataset_name": dataset,
    }


def metadata(document: str, question: str, answer: str) -> dict:
    parses = {"gt_parses": [{"question": question, "answer": answer}]}
    return {"file_name": f"pngs/{document}.pdf_0.png", "ground_truth": json.dumps(parses)}


def due(name: str, *annotations: tuple[str, list[list[str]]]) -> dict:
    """Returns a document of DUE's reference file: keys with values, each with several spellings."""
    values = [
        {"key": key, "values": [{"value": spellings[0], "value_variants": spellings} for spellings in key_values]}
        for key, key_values in annotations
    ]
    return {"name": name, "language": "en", "split": "test", "annotations": values}


def test_docvqa_is_read_from_the_file_of_all_data_sets(tmp_path):
    image = "./imgs/DUE_Benchmark/DocVQA/pngs/xnbl0037_1.png"
    write_image(tmp_path / image, 7)
    records = [
        line("DocVQA", image, "What is the date?", "1/8/93"),
        line("ChartQA", image, "How many?", "12"),
        line("DocVQA", image, "Who wrote it?", "Jane Doe"),
    ]
    write_lines(tmp_path / "val.jsonl", records)
    outcome, stub = evaluate("docvqa", tmp_path, lambda text: "1/8/93")
    assert stub.seen == ["[7]What is the date?", "[7]Who wrote it?"], "the plain question, after its image"
    assert outcome.scores.primary.value == 0.5 and outcome.scores.primary.count == 2
    assert list(outcome.answers) == ["DocVQA:1", "DocVQA:3"]
    assert "meta/ is missing (2 questions)" in summary.format_notes([outcome])


def test_docvqa_with_all_accepted_answers(tmp_path):
    image = "./imgs/rnbx0223_193.png"
    write_image(tmp_path / image, 1)
    write_lines(tmp_path / "test" / "DocVQA_test.jsonl", [line("DocVQA", image, "what is the date?", "1/8/93")])
    meta = tmp_path / "meta" / "DocVQA" / "test"
    write_lines(meta / "metadata.jsonl", [metadata("rnbx0223_193", "What is the date?", "1/8/93")])
    write_lines(meta / "document.jsonl", [due("rnbx0223_193", ("What is the date?", [["1/8/93", "January 8, 1993"]]))])
    outcome, _ = evaluate("docvqa", tmp_path, lambda text: "january  8, 1993", split="test")
    assert outcome.scores.primary.value > 0.9 and "one reference" not in summary.format_notes([outcome])

    write_lines(meta / "metadata.jsonl", [metadata("a", "b", "c"), metadata("d", "e", "f")])
    with pytest.raises(UserError, match="2 lines for the 1 questions"):
        evaluate("docvqa", tmp_path, lambda text: "", split="test")


def test_forms_are_scored_by_document_with_and_without_dropping_none(tmp_path):
    rows = [
        ("a.pdf", "advertiser", "ACME"),
        ("a.pdf", "gross_amount", "None"),
        ("b.pdf", "advertiser", "None"),
        ("b.pdf", "gross_amount", "1,000"),
    ]
    lines = [line("DeepForm", f"./imgs/{name}_0.png", f"What is the value for the {key}?", a) for name, key, a in rows]
    for name, key, _ in rows:
        write_image(tmp_path / "imgs" / f"{name}_0.png", ord(name[0]) + len(key))
    write_lines(tmp_path / "test" / "DeepForm_test.jsonl", lines)
    meta = tmp_path / "meta" / "DeepForm" / "test"
    write_lines(meta / "metadata.jsonl", [metadata(n[0], f"What is the value for the {k}?", a) for n, k, a in rows])
    write_lines(
        meta / "document.jsonl",
        [
            due("a", ("advertiser", [["ACME", "Acme Inc"]])),
            # No question asks for b's contract number, which still counts as missed.
            due("b", ("gross_amount", [["1,000", "1000"]]), ("contract_num", [["77"]])),
        ],
    )
    replies = iter(["acme inc", "None", "None", "1000"])
    outcome, _ = evaluate("deepform", tmp_path, lambda text: next(replies))
    # With None dropped, 2 of 2 predicted and 2 of 3 expected values are right. In plain DUE, 2 of 4 predicted are.
    assert outcome.scores.primary.value == pytest.approx(2 * 2 / (2 + 3))
    assert outcome.scores.others[0].value == pytest.approx(2 * 2 / (4 + 3))
    assert len(outcome.problems) == 1 and "contract_num" in str(outcome.problems)

    (meta / "document.jsonl").unlink()
    replies = iter(["acme", "None", "None", "1000"])
    outcome, _ = evaluate("deepform", tmp_path, lambda text: next(replies))
    assert outcome.scores.primary.value == pytest.approx(2 * 1 / (2 + 2)), "scored against the messages' answers"


def test_wtq_with_several_targets_and_the_case_of_tabfact(tmp_path):
    write_image(tmp_path / "imgs" / "t.png", 1)
    write_lines(
        tmp_path / "test" / "WikiTableQuestions_test.jsonl",
        [line("WikiTableQuestions", "imgs/t.png", "who?", "Anna, Eve")],
    )
    meta = tmp_path / "meta" / "WikiTableQuestions" / "test"
    write_lines(meta / "metadata.jsonl", [metadata("t", "who?", "Anna, Eve")])
    write_lines(meta / "document.jsonl", [due("t", ("who?", [["Anna"], ["Eve"]]))])
    outcome, _ = evaluate("wtq", tmp_path, lambda text: "Eve | Anna")
    assert outcome.scores.primary.value == 0 and outcome.scores.others[0].value == 1, "mPLUG-DocOwl never splits"

    statements = [line("TabFact", "imgs/t.png", f"{i}", "True") for i in range(2)]
    write_lines(tmp_path / "test" / "TabFact_test.jsonl", statements)
    outcome, _ = evaluate("tabfact", tmp_path, lambda text: "True" if "1" in text[3:] else "true")
    assert outcome.scores.primary.value == 0.5


def test_textvqa_needs_ten_answers(tmp_path):
    write_image(tmp_path / "imgs" / "TextVQA" / "003a8ae2ef43b901.jpg", 1)
    question = "what is the brand of this camera?"
    write_lines(tmp_path / "val.jsonl", [line("TextVQA", "imgs/TextVQA/003a8ae2ef43b901.jpg", question, "dakota")])
    with pytest.raises(UserError, match="TextVQA_0.5.1_val.json is missing"):
        evaluate("textvqa", tmp_path, lambda text: "dakota")
    original = {"image_id": "003a8ae2ef43b901", "question_id": 34602, "question": question}
    answers = ["dakota"] * 3 + ["nous"] * 7
    write_json(tmp_path / "meta" / "TextVQA" / "TextVQA_0.5.1_val.json", {"data": [{**original, "answers": answers}]})
    outcome, _ = evaluate("textvqa", tmp_path, lambda text: "Dakota")
    assert outcome.scores.primary.value == pytest.approx(0.9) and list(outcome.answers) == ["34602"]


def test_damaged_records_are_named_and_counted(tmp_path):
    write_image(tmp_path / "imgs" / "a.png", 1)
    (tmp_path / "imgs" / "torn.png").write_bytes(b"\x89PNG no more")
    valid = line("ChartQA", "imgs/a.png", "How many?", "12")
    records = [
        valid,
        line("ChartQA", "imgs/lost.png", "How many?", "12"),
        line("ChartQA", "imgs/torn.png", "How many?", "12"),
        {**valid, "messages": valid["messages"][:1]},
        {key: value for key, value in valid.items() if key != "image"},
    ]
    file = tmp_path / "test" / "ChartQA_test.jsonl"
    write_lines(file, records)
    file.write_text(file.read_text() + '{"image": ["imgs/a.png"], "mess\n')
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: "12")
    assert outcome.scores.primary.count == 6 and outcome.scores.primary.value == pytest.approx(1 / 6)
    reasons = list(outcome.problems.values())
    for reason, part in zip(
        reasons,
        (
            "expected 'messages' of a user and then an assistant",
            "no field 'image' (available fields: messages,",
            "not valid JSON",
            "lost.png",
            "torn.png",
        ),
        strict=True,
    ):
        assert part in reason
    notes = summary.format_notes([outcome])
    assert "5 questions could not be asked and count as wrong" in notes and "lost.png" in notes
    assert summary.to_json(outcome)["num_not_asked"] == 5


@pytest.mark.parametrize(
    "name, meta",
    [
        ("docvqa", ["DIR/meta/DocVQA/val/metadata.jsonl and document.jsonl"]),
        ("klc", ["DIR/meta/KleisterCharity/test/metadata.jsonl and document.jsonl"]),
        ("textvqa", ["DIR/meta/TextVQA/TextVQA_0.5.1_val.json"]),
        ("tabfact", []),
        ("chartqa", []),
    ],
)
def test_only_files_of_meta_that_are_read_are_named_as_expected(tmp_path, name, meta):
    with pytest.raises(UserError, match="DIR/imgs/") as error:
        evaluate(name, tmp_path, lambda text: "")
    own = str(error.value).partition("Expected files: ")[2].partition("; ")[0]
    assert [part.removeprefix("and ") for part in own.split(", ") if "meta/" in part] == [
        f"for all accepted answers {part}" if "document" in part else part for part in meta
    ]


def test_missing_files_are_described(tmp_path):
    with pytest.raises(
        UserError, match=r"DIR/val/DocVQA_val.jsonl or DIR/val.jsonl.*val_v1.0.json.*DIR/DocVQA/validation-\*.parquet"
    ):
        evaluate("docvqa", tmp_path, lambda text: "")
    with pytest.raises(UserError, match="no such folder"):
        evaluate("docvqa", tmp_path / "nowhere", lambda text: "")
    write_lines(tmp_path / "test" / "ChartQA_test.jsonl", [line("ChartQA", "imgs/a.png", "How many?", "12")])
    with pytest.raises(UserError, match="none of the 1 images of ChartQA exists.*DIR/imgs"):
        evaluate("chartqa", tmp_path, lambda text: "")
