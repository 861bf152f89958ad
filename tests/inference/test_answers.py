"""Warnings about answers: empty, cut off, in a loop, about a shrunk page, or from an untrained connector."""

import copy
import json
import pickle
import types

import numpy as np
import PIL.Image
import pytest

import alignvlm_jax
from alignvlm_jax import cli
from alignvlm_jax.checkpoints.connector_training import is_connector_trained
from alignvlm_jax.data.page_scale import page_scale, sample_scale
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.data.tiling import TilingConfig, plan_tiles
from alignvlm_jax.inference.answers import AnswerText, count_warnings, describe_text, find_loop, format_counts

# What nano answers about photos of receipts, with and without an end.
_LOOPS = ["8.2.2.2.2.2.22", "7.7.7.7.79", "the total the total the total the total the total", "0" * 12, "-" * 40]
# Numbers, names and lists that repeat themselves and are right.
_NOT_LOOPS = [
    "111111",
    "2.2.2",
    "1.1.1.1",
    "12121212",
    "0.00",
    "Miss Mississippi",
    "no no no",
    "11-11-11",
    "-" * 8,
    "",
    "x",
]


@pytest.mark.parametrize("text", _LOOPS)
def test_repetitions_are_loops(text):
    """LLaVA#1432, ollama#16892, MinerU#3312: models that read text repeat themselves, some until they are cut off."""
    assert find_loop(text, is_cut_off=False)


@pytest.mark.parametrize("text", _NOT_LOOPS)
def test_numbers_and_names_are_not_loops(text):
    assert find_loop(text, is_cut_off=False) is None


def test_the_end_of_an_answer_that_is_cut_off_shows_a_loop_sooner():
    text = "Invoice 12. " + "Total 3.50, " * 3
    assert find_loop(text, is_cut_off=False) is None
    assert find_loop(text, is_cut_off=True) == "Total 3.50, "
    assert find_loop("Milk 1.29 Bread 2.49 Apples 3.10 Chee", is_cut_off=True) is None


def test_no_answer_in_the_training_data_is_a_loop():
    answers = [answer for record in draw_records(0, "train", 0, 60) for answer in record["answers"]]
    assert len(answers) > 150
    assert [answer for answer in answers if find_loop(answer, is_cut_off=False)] == []


def test_empty_and_cut_off_answers_are_reported():
    assert set(describe_text(" ", num_tokens=1, max_new_tokens=8)) == {"empty"}
    assert describe_text("12", num_tokens=8, max_new_tokens=8) == {"cut_off": "the answer is cut off after 8 tokens"}
    assert describe_text("12", num_tokens=7, max_new_tokens=8) == {}


def test_an_answer_is_a_string_with_warnings():
    answer = AnswerText("12.50", {"loop": "it repeats"})
    assert answer == "12.50" and json.dumps([answer]) == '["12.50"]'
    for same in (copy.copy(answer), pickle.loads(pickle.dumps(answer))):
        assert (same, same.warnings) == (answer, {"loop": "it repeats"})
    assert AnswerText("x").warnings == {}


def test_warnings_are_counted():
    counts = count_warnings([("loop", "cut_off"), (), ("loop",)])
    assert counts == {"cut_off": 1, "loop": 2}
    assert format_counts(counts, 3) == "of 3 answers: 1 cut off, 2 in a loop"
    assert format_counts({}, 3) == ""


@pytest.mark.parametrize(
    ("size", "rule", "scale"),
    [
        ((73, 129), "ovis", 1.0),
        ((320, 320), "ovis", 0.5),
        ((160, 160), "internvl", 1.0),
        ((640, 640), "internvl", 0.25),
    ],
)
def test_the_scale_is_the_share_of_the_pages_side_that_is_shown(size, rule, scale):
    tiling = TilingConfig(rule, tile_size=80, max_tiles=4)
    assert page_scale(plan_tiles(*size, tiling)) == pytest.approx(scale, abs=0.01)


def test_the_scale_of_a_data_set_is_what_most_of_its_pages_reach():
    tiling = TilingConfig(tile_size=80, max_tiles=4, thumbnail=False)
    records = draw_records(0, "train", 0, 5)
    assert sample_scale([records], tiling) == 1.0
    assert sample_scale([records], TilingConfig(tile_size=20, max_tiles=1)) < 0.3
    assert sample_scale([[{"questions": []}], [{"image": b"damaged"}]], tiling) is None


def run(step_in_stage, stage=0, trainable=("connector",)):
    stages = [{"trainable": ["language"]}, {"trainable": list(trainable)}]
    return {"stage": stage, "step_in_stage": step_in_stage}, {"stages": stages}


def test_a_connector_is_trained_by_a_step_of_a_stage_that_trains_it():
    imported = {"what": "imported", "connector": "fresh, seed 0"}
    assert not is_connector_trained([imported], *run(0))
    assert not is_connector_trained([imported], *run(5)), "the first stage trains the language model only"
    assert not is_connector_trained([imported], *run(0, stage=1)) and is_connector_trained([imported], *run(1, stage=1))
    assert not is_connector_trained([], *run(9, stage=1, trainable=["vision"]))
    progress, config = run(1, stage=1)
    assert is_connector_trained([imported, {"what": "trained", "progress": progress, "config": config}], *run(0))
    assert is_connector_trained([imported, {"what": "saved by PyTorch"}], *run(0)), "nothing is known"


@pytest.fixture(scope="module")
def nano():
    """The trained model, which answers every question with the token "1", as long as it may."""
    reader = alignvlm_jax.load("nano")
    (token,) = reader.tokenizer.encode_text("1")
    reader.generator = types.SimpleNamespace(
        generate=lambda prompts, max_new_tokens, on_batch: [np.full(max_new_tokens, token)] * len(prompts)
    )
    return reader


def test_nano_warns_of_a_receipt_as_cameras_make_them_and_not_of_its_own_pages(nano):
    """The scale of the training pages is recorded in the folder of the trained model."""
    own, photo = draw_records(0, "heldout", 0, 1)[0]["image"], PIL.Image.new("RGB", (900, 1800), "white")
    answers = nano.ask_batch([own, photo], ["Total?"] * 2, max_new_tokens=4)
    assert answers == ["1111"] * 2 and list(answers[0].warnings) == ["cut_off"]
    assert "the page is shown at 0.09 of its size" in answers[1].warnings["page_scale"]


def test_ask_prints_warnings_as_one_line_on_stderr(nano, monkeypatch, tmp_path, capsys):
    untrained = copy.copy(nano)
    untrained.training = nano.training._replace(is_connector_trained=False)
    monkeypatch.setattr(alignvlm_jax, "load", lambda checkpoint: untrained)
    PIL.Image.new("RGB", (900, 1800), "white").save(tmp_path / "page.png")
    assert cli.main(["ask", "--checkpoint", "nano", str(tmp_path / "page.png"), "--question", "Total?"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "1" * 128 + "\n" and printed.err.count("\n") == 1
    for part in ("warning: the connector was never trained", "of its size", "cut off after 128 tokens", "repeats '1'"):
        assert part in printed.err
