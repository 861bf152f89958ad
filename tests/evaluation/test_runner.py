"""Tests of the evaluation, with a fake reader that decodes the number of its page from the first pixel."""

import io
import json

import PIL.Image
import pytest

from alignvlm_jax import cli
from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.runner import derangement, evaluate, write_json, write_predictions
from alignvlm_jax.inference.answers import AnswerText
from alignvlm_jax.inference.reader import TrainingRecord
from alignvlm_jax.leases.lease import InUseError
from alignvlm_jax.leases.one_writer import one_writer

FAMILIES = ("form", "receipt", "table")


def page(number: int) -> bytes:
    """Returns a PNG that encodes a number in its pixels and its height."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (20, 30 + number), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def record(number: int) -> dict:
    return {
        "id": f"page-{number}",
        "source": FAMILIES[number % 3],
        "font": "Unseen" if number % 4 == 0 else "Seen",
        "image": page(number),
        "questions": ["Which page?", "Which page, plus one?"],
        "answers": [str(number), str(number + 1)],
    }


class FakeReader:
    """Reader that answers with the number of the page, or that number plus one."""

    def __init__(self):
        self.sizes = []
        self.num_views = 1
        self.training = TrainingRecord(is_connector_trained=False)

    def with_views(self, number):
        self.num_views = number
        return self

    def prompts(self, image, questions):
        self.sizes.append(image.size)
        return [(image.getpixel((0, 0))[0], question) for question in questions]

    def answer(self, prompts, *, max_new_tokens, on_batch):
        on_batch(len(prompts))
        answers = [f"{number + ('plus' in question)} " for number, question in prompts]
        # Answers of two digits count as answers in a loop.
        return [AnswerText(answer, {"loop": "two digits"} if len(answer) > 2 else {}) for answer in answers]


RECORDS = [record(number) for number in range(9)]


def test_a_reader_is_right_on_the_pages_and_wrong_on_the_controls():
    right = evaluate(FakeReader(), RECORDS, unseen_fonts=("Unseen",))
    assert right.overall.right == right.overall.total == 18
    assert {family: tally.total for family, tally in right.per_family.items()} == dict.fromkeys(FAMILIES, 6)
    assert right.unseen_font.total == 6

    blank_reader = FakeReader()
    assert evaluate(blank_reader, RECORDS, control="blank").overall.right == 0
    assert blank_reader.sizes == [(20, 30 + number) for number in range(9)]

    wrong = evaluate(FakeReader(), RECORDS, control="wrong")
    assert wrong.overall.right == 0
    for answer in wrong.answers[::2]:
        shown_page = int(answer.predicted)
        assert FAMILIES[shown_page % 3] == answer.family and answer.document != f"page-{shown_page}"


def test_the_limit_counts_questions():
    report = evaluate(FakeReader(), RECORDS, limit=5)
    assert [answer.document for answer in report.answers] == ["page-0", "page-0", "page-1", "page-1", "page-2"]
    wrong = evaluate(FakeReader(), RECORDS, control="wrong", limit=3)
    assert [answer.document for answer in wrong.answers] == ["page-0", "page-0", "page-1"]
    assert wrong.overall.right == 0


def test_derangement_moves_every_document_within_its_family():
    families = ["a", "b", "a", "a", "b", "b", "b"]
    others = derangement(families, seed=3)
    assert sorted(others) == list(range(7))
    assert all(other != i and families[other] == families[i] for i, other in enumerate(others))


def test_unusable_data_is_refused():
    with pytest.raises(UserError, match="no questions"):
        evaluate(FakeReader(), [])
    with pytest.raises(UserError, match="two documents of each family"):
        evaluate(FakeReader(), RECORDS[:4], control="wrong")
    with pytest.raises(UserError, match="page-0"):
        evaluate(FakeReader(), [{**RECORDS[0], "image": b"not an image"}])


def test_written_files(tmp_path):
    report = evaluate(FakeReader(), RECORDS)
    write_json(report.to_json(), tmp_path / "new" / "scores.json")
    assert json.loads((tmp_path / "new" / "scores.json").read_text())["exact_match"] == 1.0
    write_predictions(report, tmp_path / "predictions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert lines[1] == {
        "document": "page-0",
        "family": "form",
        "font": "Unseen",
        "question": "Which page, plus one?",
        "expected": "1",
        "predicted": "1 ",
        "right": True,
        "warnings": [],
    }
    with pytest.raises(UserError, match="cannot be written"):
        write_json({}, tmp_path)


class ChattingReader(FakeReader):
    """Reader that answers with the numbers of its images and the number of earlier turns."""

    def cut(self, image):
        return image.getpixel((0, 0))[0]

    def chat_prompt(self, messages, images):
        parts = [part for message in messages for part in message["content"] if isinstance(part, dict)]
        assert sum(part["type"] == "image" for part in parts) == len(images)
        return [*images, len(messages) // 2]

    def answer(self, prompts, *, max_new_tokens, on_batch):
        on_batch(len(prompts))
        return [AnswerText(" ".join(map(str, prompt))) for prompt in prompts]


def conversation(number: int, *turns: tuple[int, str, str]) -> dict:
    """Returns a record of alignvlm prepare with turns of (number of images, question, answer)."""
    messages = []
    for num_images, question, answer in turns:
        parts = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    images = [page(number + i) for i in range(sum(num_images for num_images, _, _ in turns))]
    return {"id": f"c{number}", "source": "llava", "conversation": json.dumps(messages), "images": images}


def test_prepared_conversations_are_scored_turn_by_turn():
    records = [
        conversation(10, (1, "Which?", "10 0"), (0, "And then?", "10 1"), (1, "And here?", "no")),
        conversation(20, (2, "Both?", "20 21 0")),
        conversation(30, (0, "Nothing shown?", "0")),
    ]
    report = evaluate(ChattingReader(), records)
    assert [(answer.question, answer.predicted) for answer in report.answers] == [
        ("Which?", "10 0"),
        ("And then?", "10 1"),
        ("And here?", "10 11 2"),
        ("Both?", "20 21 0"),
        ("Nothing shown?", "0"),
    ]
    assert report.overall.right == 4 and list(report.per_family) == ["llava"]
    assert len(evaluate(ChattingReader(), records, limit=2).answers) == 2
    assert evaluate(ChattingReader(), records, control="blank").answers[0].predicted == "255 0"
    with pytest.raises(UserError, match="does not support conversations; use 'blank'"):
        evaluate(ChattingReader(), records, control="wrong")
    with pytest.raises(UserError, match="c20: image: not an image"):
        evaluate(ChattingReader(), [{**records[1], "images": [b"torn", b"torn"]}])
    with pytest.raises(UserError, match="cannot score records with the fields id, caption: expected documents"):
        evaluate(ChattingReader(), [{"id": "1", "caption": "?"}])


def test_records_that_show_the_same_page_are_asked_together(monkeypatch):
    monkeypatch.setattr(runner, "_DOCUMENTS_AT_ONCE", 2)
    one_question = [
        {**record(number), "id": f"{number}, {i}", "questions": [question], "answers": [answer]}
        for i in range(2)
        for number in range(3)
        for question, answer in [list(zip(record(number)["questions"], record(number)["answers"], strict=True))[i]]
    ]
    reader, calls = FakeReader(), []
    monkeypatch.setattr(
        reader,
        "answer",
        lambda prompts, **options: calls.append(prompts) or FakeReader.answer(reader, prompts, **options),
    )
    report = evaluate(reader, one_question)
    questions = record(0)["questions"]
    assert calls == [[(0, question) for question in questions], [(1, question) for question in questions]] + [
        [(2, question) for question in questions]
    ]
    assert reader.sizes == [(20, 30), (20, 31), (20, 32)], "each page is decoded and cut once"
    assert [answer.document for answer in report.answers] == [one["id"] for one in one_question]
    assert report.overall.right == 6


def test_conversations_about_the_same_image_are_asked_together(monkeypatch):
    cut, num_cut = ChattingReader.cut, []
    monkeypatch.setattr(ChattingReader, "cut", lambda self, image: num_cut.append(1) or cut(self, image))
    records = [
        conversation(10, (1, "A?", "10 0")),
        conversation(20, (1, "B?", "20 0")),
        conversation(10, (1, "C?", "")),
    ]
    report = evaluate(ChattingReader(), records)
    assert [answer.predicted for answer in report.answers] == ["10 0", "20 0", "10 0"]
    assert [answer.question for answer in report.answers] == ["A?", "B?", "C?"]
    assert len(num_cut) == 2


@pytest.mark.parametrize("checkpoint", ["nano", str(NANO_MODEL)])
def test_an_exported_folder_is_scored_on_the_given_data(monkeypatch, tmp_path, capsys, checkpoint):
    monkeypatch.setattr(runner.store, "open_dataset", lambda folder, split: RECORDS)
    fake = FakeReader()
    monkeypatch.setattr(runner, "load", lambda *args, **options: fake)
    report = runner.evaluate_checkpoint(checkpoint, data="pages", json_file=tmp_path / "scores.json")
    printed = capsys.readouterr()
    assert report.overall.right == 18 and f"{NANO_MODEL}: split 'heldout' of pages" in printed.out
    assert "warnings" not in printed.out
    assert "warning: the connector was never trained" in printed.err
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert figures["checkpoint"] == str(NANO_MODEL) and figures["step"] is None
    assert figures["views"] == fake.num_views == 1
    runner.evaluate_checkpoint(checkpoint, data="pages", views=3, json_file=tmp_path / "views.json")
    assert "every question with the page itself, 3 views per image" in capsys.readouterr().out
    assert json.loads((tmp_path / "views.json").read_text())["views"] == fake.num_views == 3
    with pytest.raises(UserError, match="has no data set; name one with --data"):
        runner.evaluate_checkpoint(checkpoint)


def test_metrics_and_wrong_answers_of_a_data_set(monkeypatch, tmp_path, capsys):
    """The second question about page 3 is answered by 4; page 8 answers 9, and 9.3 is within 5 % of it."""
    records = [{**RECORDS[3], "answers": ["3", "14"]}, {**RECORDS[8], "answers": ["8", "9.3"]}]
    monkeypatch.setattr(runner.store, "open_dataset", lambda folder, split: records)
    monkeypatch.setattr(runner, "load", lambda *args, **options: FakeReader())
    arguments = ["eval", "--checkpoint", "nano", "--data", "pages", "--split", "test"]
    files = ["--json", f"{tmp_path}/scores.json", "--predictions", f"{tmp_path}/answers.jsonl"]
    assert cli.main([*arguments, "--metric", "exact,anls,relaxed,f1", "--show-wrong", "1", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["questions", "exact", "match", "ANLS", "relaxed", "accuracy", "F1"]
    table = [line.split()[:3] for line in lines[3:6]]
    assert table == [["form", "2", "0.50"], ["table", "2", "0.50"], ["all", "4", "0.50"]]
    image = tmp_path / "answers.wrong" / "0-1.png"
    assert lines[-7:] == [
        "wrong answers by exact match, 1 of 2:",
        "",
        "page-3",
        f"  image     {image}",
        "  question  Which page, plus one?",
        "  answer    4",
        "  expected  14",
    ]
    assert image.read_bytes() == records[0]["image"]
    metrics = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert {name: (score["score"], score["count"]) for name, score in metrics.items()} == {
        "exact": (0.5, 4),
        "anls": (0.625, 4),
        "relaxed": (0.75, 4),
        "f1": (0.5, 2),
    }
    assert metrics["relaxed"]["per_group"]["table"] == {"score": 1.0, "interval_95": [0.3424, 1.0], "count": 2}
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[1]["scores"] == {"anls": 0.5, "relaxed": 0.0, "f1": 0.0} and not answers[1]["right"]

    # By relaxed accuracy one answer is wrong. Without --predictions, its image is in a temporary folder.
    assert cli.main([*arguments, "--metric", "relaxed", "--show-wrong", "9"]) == 0
    shown = capsys.readouterr().out
    assert "wrong answers by relaxed accuracy, 1 of 1:" in shown and "9.3" not in shown
    assert cli.main([*arguments, "--metric", "exact,anlss"]) == 2
    assert "--metric anlss: expected one or more of exact, anls, relaxed, f1: did you mean 'anls'?" in (
        capsys.readouterr().err
    )
    assert cli.main([*arguments, "--benchmark", "docvqa", "--metric", "anls"]) == 2


def test_two_runs_do_not_write_one_file_of_predictions(monkeypatch, tmp_path):
    """open-compass/VLMEvalKit#1540: the processes of two evaluations write to one place."""
    monkeypatch.setattr(runner.store, "open_dataset", lambda folder, split: RECORDS)
    monkeypatch.setattr(runner, "load", lambda *args, **options: pytest.fail("the model must not be loaded"))
    file = tmp_path / "answers.jsonl"
    with one_writer(file, beside=True), pytest.raises(InUseError, match="answers.jsonl: another run is writing to it"):
        runner.evaluate_checkpoint("nano", data="pages", predictions_file=file)
    monkeypatch.setattr(runner, "load", lambda *args, **options: FakeReader())
    runner.evaluate_checkpoint("nano", data="pages", predictions_file=file)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
