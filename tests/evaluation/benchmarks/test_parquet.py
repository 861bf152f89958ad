"""Tests of the readers of Parquet files, with the columns of the published files."""

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import summary
from tests.evaluation.benchmarks.stub import cell, evaluate, write_parquet

DOCVQA = {
    "question_types": ["form"],
    "docId": 14465,
    "ucsf_document_id": "pybv0228",
    "ucsf_document_page_no": "81",
    "data_split": "val",
}


def test_docvqa_and_infovqa(tmp_path):
    rows = [
        {"questionId": str(i), "question": f"What is {i}?", "image": cell(i), "answers": [f"{i}!", "other"], **DOCVQA}
        for i in range(5)
    ]
    write_parquet(tmp_path / "DocVQA" / "validation-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "InfographicVQA" / "validation-00000-of-00001.parquet", rows[:1])
    outcome, stub = evaluate("docvqa", tmp_path, lambda text: f"{text[1]}!")
    assert stub.seen == [f"[{i}]What is {i}?" for i in range(5)], "each question with its own row's image"
    assert outcome.scores.primary.value == 1 and list(outcome.answers) == ["0", "1", "2", "3", "4"]
    assert evaluate("infovqa", tmp_path, lambda text: "OTHER")[0].scores.primary.value == 1


def test_chartqa_in_both_forms(tmp_path):
    rows = [
        {"type": "human_test", "question": "How many?", "answer": "14", "image": cell(1)},
        {"type": "augmented_test", "question": "Which year?", "answer": "1999", "image": cell(2)},
        {"type": "augmented_test", "question": "Which?", "answer": "Yes", "image": cell(2)},
    ]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: "2019" if "year" in text else "yes")
    assert outcome.scores.primary.value == pytest.approx(2 / 3), "the tolerance of 5 % holds for years too"
    assert {score.name: (score.value, score.count) for score in outcome.scores.others} == {
        "augmented": (1.0, 2),
        "human": (0.0, 1),
    }
    m4 = [{"query": "How many?", "label": ["14"], "human_or_machine": 0, "image": cell(1)}]
    write_parquet(tmp_path / "m4" / "data" / "test-00000-of-00001.parquet", m4)
    assert evaluate("chartqa", tmp_path / "m4", lambda text: "14.5")[0].scores.primary.value == 1


def test_textvqa(tmp_path):
    row = {"image_id": "a", "question_id": 34602, "question": "what brand?", "image": cell(3), "set_name": "val"}
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [{**row, "answers": ["nous"] * 10}])
    outcome, _ = evaluate("textvqa", tmp_path, lambda text: "nous.")
    assert outcome.scores.primary.value == 1 and list(outcome.answers) == ["34602"]


def test_tablevqa_as_the_authors_scored_gpt4v(tmp_path):
    # Answers and scores (relieved, exact) from naver-ai/tablevqabench, outputs/gpt4v_evaluated/fintabnetqa.json.
    official = [
        ("Printing & Identification, Industrials.", "Printing & Identification", 0, 0),
        ("$641.8", "$641.8 million", 1, 0),
        ("36,701", "36,701", 1, 1),
        ("0.123 billion gallons", "0.123 billion gallons", 1, 1),
        ("576,000", "576,000 square feet", 1, 1),
        ("$11,832,000", "$11,832 thousand", 1, 1),
        (".497", "49.7%", 1, 1),
        ("$(16.7) million", "$16.7 million", 1, 1),
        ("12.7", "12.7 million", 1, 0),
        ("48%", "60%", 0, 0),
    ]
    table = {"text_html_table": "<table>", "text_markdown_table": "| |"}
    rows = [
        {"qa_id": f"p{i}", "question": f"q{i}", "gt": gt, "image": cell(i), **table}
        for i, (gt, *_) in enumerate(official)
    ]
    answers = {f"q{i}": answer for i, (_, answer, *_) in enumerate(official)}
    write_parquet(tmp_path / "data" / "fintabnetqa-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match="3 of TableVQA-Bench's parts are missing .of 4.: vwtq, vwtq_syn, vtabfact"):
        evaluate("tablevqa", tmp_path, lambda text: "")
    wtq = {"qa_id": "nu-1", "question": "who", "gt": "Anna|Eve", "image": cell(99), **table}
    write_parquet(tmp_path / "data" / "vwtq-00000-of-00001.parquet", [wtq])
    write_parquet(tmp_path / "data" / "vwtq_syn-00000-of-00001.parquet", [{**wtq, "gt": "3"}])
    fact = {"qa_id": "2-1", "question": "one won", "gt": 1, "image": cell(98), **table}
    write_parquet(tmp_path / "data" / "vtabfact-00000-of-00001.parquet", [fact])

    def rule(text):
        if "Statement: one won\n" in text:
            return "This is true."
        if "Question: who\n" in text:
            return "Eve||Anna"
        return answers[text.rsplit("Question: ", 1)[1].split("\n")[0]]

    outcome, stub = evaluate("tablevqa", tmp_path, rule)
    scores = {score.name: score.value for score in outcome.scores.others}
    assert scores["fintabnetqa"] == pytest.approx(sum(row[2] for row in official) / 10)
    assert scores["fintabnetqa, strict"] == pytest.approx(sum(row[3] for row in official) / 10)
    assert scores["vwtq"] == 1 and scores["vwtq_syn"] == 0 and scores["vtabfact"] == 1
    assert outcome.scores.primary.value == pytest.approx((8 + 2) / 13), "weighted by questions"
    assert stub.seen[0].startswith("[99]You are asked to answer questions asked on an image.\n")

    write_parquet(tmp_path / "data" / "vtabfact-00000-of-00001.parquet", [{**fact, "gt": 2}])
    outcome, _ = evaluate("tablevqa", tmp_path, rule)
    assert "expected 1 or 0 as the answer to a statement, got '2'" in str(
        outcome.problems
    ) and outcome.scores.primary.value == pytest.approx((8 + 1) / 13)

    # An item "nan" makes the official scorer fail. Here it counts as wrong and is reported.
    outcome, _ = evaluate("tablevqa", tmp_path, lambda text: "nan" if "Question: who\n" in text else rule(text))
    assert [id for id, _ in outcome.scores.aborted] == ["vwtq:nu-1", "vwtq_syn:nu-1"]
    assert "official scorer would fail with an error on 2 answers" in summary.format_notes([outcome])


def test_vcr_asks_once_for_all_covered_texts(tmp_path):
    images = {"image": cell(1), "only_it_image": cell(3), "only_it_image_small": cell(4)}
    rows = [
        {"question_id": "0", "stacked_image": cell(7), "caption": "a b", "crossed_text": ["the old town", "in 1999"]},
        {"question_id": "1", "stacked_image": cell(8), "caption": "c", "crossed_text": ["Lake Victoria"]},
    ]
    names = ("stacked_image", *images)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{**row, **images} for row in rows], names)
    answer_by_image = {"[7]": "the old city and in 1999", "[8]": "Lake Victoria"}
    outcome, stub = evaluate("vcr_en_easy", tmp_path, lambda text: answer_by_image[text[:3]])
    assert stub.seen[0].startswith("[7]What is the covered texts in the image? Please restore")
    assert outcome.scores.primary.value == pytest.approx(2 / 3), "two of three texts, not the mean over images"
    assert outcome.scores.others[0].value == pytest.approx((2 / 4 + 2) / 3)


def test_mmmu_places_images_at_their_mentions(tmp_path):
    empty = {f"image_{i}": None for i in range(1, 8)}
    common = {"explanation": "", "img_type": "['Tables']", "topic_difficulty": "Easy", "subfield": "x"}
    rows = [
        {
            "id": "validation_Accounting_1",
            "question": "Compare <image 1> with <image 2>.",
            "options": "['<image 2>', 'neither']",
            "answer": "B",
            "question_type": "multiple-choice",
            **common,
            **empty,
            "image_1": cell(1),
            "image_2": cell(2),
        },
        {
            "id": "validation_Art_Theory_7",
            "question": "How much is it? <image 1>",
            "options": "[]",
            "answer": "['6.5', '13/2']",
            "question_type": "open",
            **common,
            **empty,
            "image_1": cell(3),
        },
        {
            "id": "validation_Art_Theory_8",
            "question": "Who painted this?",
            "options": "['Klee', 'Miro']",
            "answer": "A",
            "question_type": "multiple-choice",
            **common,
            **empty,
            "image_1": cell(4),
        },
    ]
    columns = tuple(empty)
    write_parquet(tmp_path / "Accounting" / "validation-00000-of-00001.parquet", rows[:1], columns)
    write_parquet(tmp_path / "Art_Theory" / "validation-00000-of-00001.parquet", rows[1:], columns)
    outcome, stub = evaluate(
        "mmmu",
        tmp_path,
        lambda text: "It is 6.50" if "[3]" in text else "(B)" if "[2]" in text else "?",
        allow_partial=True,
    )
    choose = "Answer with the option's letter from the given choices directly."
    assert stub.seen[0] == f"Compare [1] with [2].\nA. [2]\nB. neither\n\n{choose}"
    assert stub.seen[1] == "How much is it? [3]\n\nAnswer the question using a single word or phrase."
    assert stub.seen[2] == f"[4]Who painted this?\nA. Klee\nB. Miro\n\n{choose}", (
        "an image without a mention comes first"
    )
    assert outcome.scores.primary.value == pytest.approx(2 / 3)
    others = {score.name: score.value for score in outcome.scores.others}
    assert others == {"Accounting": 1.0, "Art Theory": 0.5, "answers that name no option": 0.5}

    test = [{**row, "id": row["id"].replace("validation", "test"), "answer": "?"} for row in rows]
    write_parquet(tmp_path / "Art_Theory" / "test-00000-of-00001.parquet", test, columns)
    outcome, _ = evaluate("mmmu", tmp_path, lambda text: "A", split="test", allow_partial=True)
    assert outcome.scores is None
    assert outcome.benchmark.submission(outcome.questions, outcome.answers)["test_Accounting_1"] == "A"


def test_seed_pope_and_gqa(tmp_path):
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "segment": None}
    seed = {"question": "How many towels?", "answer": "A", "data_id": "1", "question_type_id": 5, **choices}
    rows = [
        {**seed, "question_id": "101669", "data_type": "image", "image": [cell(5)]},
        {**seed, "question_id": "v1", "data_type": "video", "image": [cell(6), cell(7)]},
    ]
    write_parquet(tmp_path / "seed" / "data" / "test-00000-of-00001.parquet", rows)
    outcome, stub = evaluate("seed", tmp_path, lambda text: "A. One")
    assert outcome.scores.primary.value == 1 and len(stub.seen) == 1, "questions about videos are skipped"
    assert stub.seen[0].startswith("[5]How many towels?\nA. One\nB. Two\n")

    pope = {"id": "0", "question": "Is there a dog?", "image_source": "COCO_1"}
    rows = [
        {**pope, "question_id": "1", "answer": "yes", "category": "random", "image": cell(1)},
        {**pope, "question_id": "1", "answer": "no", "category": "popular", "image": cell(2)},
    ]
    write_parquet(tmp_path / "pope" / "data" / "test-00000-of-00001.parquet", rows)
    outcome, _ = evaluate("pope", tmp_path, lambda text: "Yes")
    assert outcome.scores.primary.value == pytest.approx(2 / 3) and outcome.scores.others[0].value == 0.5

    rows = [{"id": "201307251", "imageId": "n2", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No."}]
    write_parquet(tmp_path / "gqa" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    images = [{"id": "n1", "image": cell(1)}, {"id": "n2", "image": cell(9)}]
    write_parquet(tmp_path / "gqa" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)
    outcome, stub = evaluate("gqa", tmp_path, lambda text: "No.")
    assert outcome.scores.primary.value == 1 and stub.seen[0].startswith("[9]Is it overcast?\n")


def test_damaged_rows_and_files_are_reported(tmp_path):
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    valid = {"type": "human_test", "question": "How many?", "answer": "14", "image": cell(1)}
    write_parquet(file, [valid, {**valid, "image": None}, {**valid, "image": {"bytes": b"not an image", "path": None}}])
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: "14")
    assert outcome.scores.primary.count == 3 and outcome.scores.primary.value == pytest.approx(1 / 3)
    no_image, not_an_image = outcome.problems.values()
    assert "row 2: no field 'image'" in no_image and "row group 1, row 0" in not_an_image
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet.*fetch it again"):
        evaluate("chartqa", tmp_path, lambda text: "14")
