"""Tests of the readers of the authors' own files: JSON and folders of images."""

import json

import pytest

from alignvlm_jax.errors import UserError
from tests.evaluation.benchmarks.stub import evaluate, write_image, write_json, write_lines


def test_docvqa_in_the_format_of_the_robust_reading_competition(tmp_path):
    write_image(tmp_path / "documents" / "pybv0228_81.png", 5)
    question = {
        "questionId": 49153,
        "question": "What is the ‘actual’ value per 1000?",
        "question_types": ["figure/diagram"],
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["0.28"],
        "data_split": "val",
    }
    header = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val"}
    write_json(tmp_path / "val_v1.0_withQT.json", {**header, "data": [question]})
    outcome, stub = evaluate("docvqa", tmp_path, lambda text: "0.29")
    assert stub.seen == ["[5]What is the ‘actual’ value per 1000?"]
    assert outcome.scores.primary.value == pytest.approx(0.75)

    # The test split has no answers. It gives a file for the server instead of a score.
    del question["answers"]
    write_json(tmp_path / "test_v1.0.json", {**header, "data": [question]})
    outcome, _ = evaluate("docvqa", tmp_path, lambda text: "0.29", split="test")
    assert outcome.scores is None
    assert outcome.benchmark.submission(outcome.questions, outcome.answers) == [{"questionId": 49153, "answer": "0.29"}]

    write_json(tmp_path / "val_v1.0_withQT.json", [question])
    with pytest.raises(UserError, match="in a list 'data', as in RRC's files; there is no such list"):
        evaluate("docvqa", tmp_path, lambda text: "")


def test_infovqa_in_the_format_of_the_robust_reading_competition(tmp_path):
    write_image(tmp_path / "infographicsvqa_images" / "38313.jpeg", 6)
    question = {
        "questionId": 98313,
        "question": "Which social platform has heavy female audience?",
        "image_local_name": "38313.jpeg",
        "image_url": "https://",
        "ocr_output_file": "38313.json",
        "answers": ["pinterest"],
        "answer_type": ["single span"],
        "evidence": ["figure"],
        "operation/reasoning": [],
        "data_split": "val",
    }
    write_json(
        tmp_path / "infographicsVQA_val_v1.0_withQT.json", {"dataset_name": "infographicVQA", "data": [question]}
    )
    outcome, stub = evaluate("infovqa", tmp_path, lambda text: "Pinterest")
    assert stub.seen[0].startswith("[6]Which") and outcome.scores.primary.value == 1


def test_chartqa_in_the_authors_format(tmp_path):
    folder = tmp_path / "ChartQA Dataset" / "test"
    write_image(folder / "png" / "41699051005347.png", 1)
    write_json(folder / "test_human.json", [{"imgname": "41699051005347.png", "query": "How many?", "label": "14"}])
    augmented = [{"imgname": "41699051005347.png", "query": f"q{i}?", "label": str(i)} for i in range(3)]
    write_json(folder / "test_augmented.json", augmented)
    outcome, _ = evaluate("chartqa", tmp_path, lambda text: text[4] if "q" in text else "14")
    assert outcome.scores.primary.value == 1 and [score.count for score in outcome.scores.others] == [3, 1]


def test_textvqa_in_the_authors_format(tmp_path):
    write_image(tmp_path / "train_images" / "003a8ae2ef43b901.jpg", 2)
    question = {
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "question_id": 34602,
        "question": "what is the brand of this camera?",
        "question_tokens": ["what"],
        "image_width": 1024,
        "image_height": 664,
        "flickr_original_url": "https://",
        "answers": ["nous les gosses"] + ["dakota"] * 9,
        "set_name": "val",
    }
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [question]})
    assert evaluate("textvqa", tmp_path, lambda text: "Dakota")[0].scores.primary.value == 1


def test_seed_bench_in_the_authors_format(tmp_path):
    write_image(tmp_path / "SEED-Bench-image" / "1454426_2591111986", 3)
    question = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = {**question, "question_id": "v1", "data_type": "video", "question_type_id": 10}
    types = {"Instances Counting": 5, "Action Recognition": 10}
    write_json(tmp_path / "SEED-Bench.json", {"questions": [question, video], "question_type": types})
    outcome, _ = evaluate("seed", tmp_path, lambda text: "A")
    assert len(outcome.questions) == 1 and outcome.questions[0].group == "Instances Counting"


def test_mmvet_writes_the_file_for_its_judge(tmp_path):
    write_image(tmp_path / "mm-vet" / "images" / "v1_0.png", 1)
    entry = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    write_json(tmp_path / "mm-vet" / "mm-vet.json", {"v1_0": {**entry, "imagesource": "https://"}})
    outcome, stub = evaluate("mmvet", tmp_path, lambda text: "x = -1 or x = -5")
    assert stub.seen == ["[1]What is x?"] and outcome.scores is None
    assert outcome.benchmark.submission(outcome.questions, outcome.answers) == {"v1_0": "x = -1 or x = -5"}


def test_pope_in_the_authors_format(tmp_path):
    write_image(tmp_path / "val2014" / "COCO_val2014_000000016631.jpg", 1)
    for category in ("random", "popular", "adversarial"):
        write_lines(
            tmp_path / "coco" / f"coco_pope_{category}.json",
            [
                {
                    "question_id": i,
                    "image": "COCO_val2014_000000016631.jpg",
                    "text": f"Is there a {thing}?",
                    "label": label,
                }
                for i, (thing, label) in enumerate([("dog", "yes"), ("cat", "yes"), ("cow", "no"), ("car", "no")])
            ],
        )
    outcome, stub = evaluate(
        "pope", tmp_path, lambda text: "No, there is no." if "cat" in text or "car" in text else "Yes."
    )
    assert stub.seen[0] == "[1]Is there a dog?\nAnswer the question using a single word or phrase."
    # Each part has one right yes, one missed yes and one false yes.
    assert outcome.scores.primary.value == pytest.approx(0.5)
    others = {score.name: score.value for score in outcome.scores.others}
    assert others["accuracy"] == others["share of yes"] == others["popular, F1"] == others["random, accuracy"] == 0.5
    (tmp_path / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="1 of POPE's parts is missing .of 3.: coco_pope_popular.json"):
        evaluate("pope", tmp_path, lambda text: "")


def test_gqa_in_the_authors_format(tmp_path):
    write_image(tmp_path / "images" / "n161313.jpg", 1)
    entry = {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No, it is clear."}
    write_json(tmp_path / "testdev_balanced_questions.json", {"201307251": {**entry, "isBalanced": True}})
    assert evaluate("gqa", tmp_path, lambda text: "No.")[0].scores.primary.value == 1


def test_a_damaged_file_is_reported(tmp_path):
    text = json.dumps({"v1_0": {"imagename": "v1_0.png", "question": "What is x?"}})
    (tmp_path / "mm-vet.json").write_text(text[:-3])
    with pytest.raises(UserError, match="cannot be read as JSON.*fetch it again"):
        evaluate("mmvet", tmp_path, lambda text: "")
