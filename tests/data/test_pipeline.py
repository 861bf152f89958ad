"""The pipeline as a function of (seed, step), and what becomes of records that cannot be used."""

import dataclasses
import io
import logging

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data import pipeline
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import conversation, iterate, locate_example, make_pipeline, steps_per_epoch
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from tests.data.nano_tokenizer import write_chat_folder

TILING = TilingConfig(tile_size=32, max_tiles=4, thumbnail=False)
PACKING = PackingConfig(tokens_per_bin=160, tiles_per_bin=6, bins_per_microbatch=2, examples_per_bin=8)
PER_TILE = 4


@dataclasses.dataclass(frozen=True)
class Part:
    dataset: str
    split: str = "train"
    task: str = "qa"
    weight: float = 1.0


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ChatTokenizer.from_folder(write_chat_folder(tmp_path_factory.mktemp("tokenizer")))


def _record(i, rng, size=None):
    width, height = size or rng.integers(20, 64, 2)
    page = np.full((height, width, 3), i % 256, np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(page).save(buffer, "PNG")
    turns = int(rng.integers(1, 4))
    return {
        "image": buffer.getvalue(),
        "id": f"page-{i}",
        "source": "receipt",
        "font": "any",
        "transcription": f"Invoice {i}\nthe total {i}.50",
        "questions": [f"What is {i}-{turn}?" for turn in range(turns)],
        "answers": [f"{i}.{turn}" for turn in range(turns)],
    }


@pytest.fixture(scope="module")
def records():
    rng = np.random.default_rng(0)
    return [_record(i, rng) for i in range(41)]


def _make(records, chat, mixture=(Part("documents"),), **changes):
    sources = records if isinstance(records, dict) else {"documents/train": records}
    options = dict(global_batch=8, seed=3, tokens_per_tile=PER_TILE, max_text_tokens=120)
    return make_pipeline(sources, mixture, chat, TILING, PACKING, **{**options, **changes})


def _numbers(batch):
    return sorted(batch["example_ids"][batch["example_ids"] >= 0].tolist())


def _equal(one, two):
    assert one.keys() == two.keys()
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_a_step_is_a_function_of_seed_and_index(records, chat):
    dataset, again = _make(records, chat), _make(records, chat)
    forward = [dataset[i] for i in range(12)]
    for i in reversed(range(12)):
        assert _equal(again[i], forward[i])
    assert not _equal(_make(records, chat, seed=4)[0], forward[0])


def test_resume_with_threads(records, chat):
    dataset = _make(records, chat)
    for threads in (0, 3):
        batches = iterate(dataset, start_step=5, read_threads=threads)
        for step in range(5, 12):
            assert _equal(next(batches), dataset[step])


def test_epochs_hold_every_record_once_in_a_new_order(records, chat):
    dataset = _make(records[:40], chat)
    assert steps_per_epoch({"documents/train": records[:40]}, [Part("documents")], 8) == 5
    epochs = [[_numbers(dataset[step]) for step in range(5 * epoch, 5 * epoch + 5)] for epoch in range(2)]
    for epoch in epochs:
        assert all(len(step) == 8 for step in epoch)
        assert sorted(sum(epoch, [])) == list(range(40))
    assert epochs[0] != epochs[1]


def test_batch_holds_what_the_records_say(records, chat):
    batch = _make(records, chat)[0]
    assert batch["num_examples"].sum() == 8 and batch["num_refused"].sum() == 0
    rows = {name: field.reshape(-1, *field.shape[2:]) for name, field in batch.items()}
    found = 0
    for row, numbers in enumerate(rows["example_ids"]):
        for segment, number in enumerate(numbers[numbers >= 0], start=1):
            here = rows["segment_ids"][row] == segment
            answers = rows["targets"][row][here][rows["loss_weights"][row][here] > 0]
            expected = records[number]["answers"]
            assert sorted(chat.decode(turn) for turn in _split(answers, chat.end_ids[0])) == sorted(expected)
            tile = rows["visual_index"][row][here].max() // PER_TILE
            assert (rows["tiles"][row, tile, 0, 0] == number).all()
            found += 1
    assert found == 8


def _split(ids, end):
    stops = np.flatnonzero(ids == end)
    assert stops[-1] == len(ids) - 1
    return [part[part != end] for part in np.split(ids, stops[:-1] + 1)]


def test_mixture_by_weight(records, chat):
    sources = {"documents/train": records[:30], "captions/train": records[30:]}
    mixture = (Part("documents", weight=3.0), Part("captions", task="transcribe", weight=1.0))
    dataset = _make(sources, chat, mixture)
    numbers = sum((_numbers(dataset[step]) for step in range(20)), [])
    assert len(numbers) == 160
    assert sum(number >= 30 for number in numbers) == 40
    assert locate_example(sources, mixture, 31) == ("captions/train", 1)
    assert steps_per_epoch(sources, mixture, 8) == 6
    with pytest.raises(ValueError, match="41"):
        locate_example(sources, mixture, 41)


def test_two_parts_of_one_source_run_in_orders_of_their_own(records, chat):
    mixture = (Part("documents", task="qa"), Part("documents", task="transcribe"))
    numbers = _numbers(_make(records, chat, mixture)[0])
    assert len(numbers) == 8 and numbers[::2] != numbers[1::2]


def test_conversations():
    record = _record(7, np.random.default_rng(1))
    record["questions"], record["answers"] = ["a?", "b?", "c?"], ["1", "2", "3"]
    rng = np.random.default_rng(0)
    read = conversation(record, "transcribe", rng)
    assert read[0]["content"] == [{"type": "image"}, {"type": "text", "text": pipeline.TRANSCRIBE_INSTRUCTION}]
    assert read[1:] == [{"role": "assistant", "content": "Invoice 7\nthe total 7.50"}]
    orders = set()
    for _ in range(40):
        asked = conversation(record, "qa", rng)
        assert sum(part["type"] == "image" for message in asked[::2] for part in message["content"]) == 1
        assert asked[0]["content"][0] == {"type": "image"}
        pairs = tuple((q["content"][-1]["text"], a["content"]) for q, a in zip(asked[::2], asked[1::2], strict=True))
        assert sorted(pairs) == [("a?", "1"), ("b?", "2"), ("c?", "3")]
        orders.add(pairs)
    assert len(orders) == 6
    assert {len(conversation(record, "qa", rng, max_turns=2)) for _ in range(5)} == {4}
    kinds = [conversation(record, "mixed", rng)[1]["content"].startswith("Invoice") for _ in range(100)]
    assert 30 < sum(kinds) < 70


def test_questions_come_in_another_order_in_another_epoch(chat):
    rng = np.random.default_rng(0)
    record = {**_record(0, rng), "questions": list("abcdefgh"), "answers": list("12345678")}
    dataset = _make([record], chat, global_batch=1)
    assert len({dataset[step]["tokens"].tobytes() for step in range(6)}) > 3


def test_bad_records_are_counted_and_named(records, chat, caplog):
    bad = {
        "page-0": dict(image=b"not a picture"),
        "page-1": dict(questions=[], answers=[]),
        "page-2": dict(answers=["1"] * 9),
        "page-3": dict(transcription="far too long " * 100, questions=["q" * 400], answers=["a"]),
        "page-4": dict(image=records[4]["image"][:-20]),
        "page-5": dict(questions=[None], answers=["a"]),
    }
    broken = [{**record, **bad.get(record["id"], {})} for record in records[:16]]
    del broken[6]["questions"]
    dataset = _make(broken, chat)
    with caplog.at_level(logging.WARNING):
        batches = [dataset[0], dataset[1]]
    assert sum(batch["num_refused"].sum() for batch in batches) == 7
    assert sorted(sum((_numbers(batch) for batch in batches), [])) == list(range(7, 16))
    messages = sorted(record.getMessage() for record in caplog.records)
    reasons = [
        "not an image",
        "0 questions",
        "9 answers",
        "limit is 120",
        "damaged",
        "NoneType",
        "no field 'questions'",
    ]
    for i, (message, reason) in enumerate(zip(messages, reasons, strict=True)):
        assert message.startswith(f"refused example page-{i} of documents/train: ") and reason in message


def test_an_example_larger_than_a_bin_is_refused(chat):
    rng = np.random.default_rng(0)
    pages = [_record(i, rng, size=(64, 64) if i == 3 else (30, 30)) for i in range(8)]  # Four tiles, or one.
    packing = dataclasses.replace(PACKING, tiles_per_bin=3)
    batch = make_pipeline(
        {"documents/train": pages},
        [Part("documents")],
        chat,
        TILING,
        packing,
        global_batch=8,
        seed=0,
        tokens_per_tile=PER_TILE,
    )[0]
    assert _numbers(batch) == [0, 1, 2, 4, 5, 6, 7]
    assert batch["num_refused"].sum() == 1 and batch["num_examples"].sum() == 7


def test_wrong_mixtures(records, chat):
    with pytest.raises(UserError, match="no data set 'other/train'; there are: documents/train"):
        _make(records, chat, [Part("other")])
    with pytest.raises(UserError, match="'documents/train' is empty"):
        _make([], chat)
    with pytest.raises(UserError, match="must be positive, got 0"):
        _make(records, chat, [Part("documents", weight=0)])
    with pytest.raises(UserError, match="no parts"):
        _make(records, chat, [])
