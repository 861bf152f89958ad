"""Examples by their position: the measured size is the size made, and unusable examples are refused by name."""

import dataclasses
import io
import itertools
import pickle

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data.examples import Part, locate_example, number_parts
from alignvlm_jax.data.packing import Refused
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.data.window import MeasuredExample
from alignvlm_jax.errors import UserError
from tests.data.pages import PACKING, PER_TILE, mixed_records, page, pages, png_image, prepared, reader, turn


def _mixed(count=24):
    return [Part("mixed/train", mixed_records(count), "conversation")]


def _all(reader):
    """Returns the examples of an epoch, by number."""
    measured = [_measure(reader, position) for position in range(reader.num_groups)]
    made = [reader.make(example) for example in measured]
    return {example.numbers[0]: example for example in made}, measured, made


def _measure(reader, position):
    """Returns the only example at a position, or why it is refused."""
    (measured,) = reader.measure(position)
    return measured


def _make(reader, measured):
    """Returns the example that was measured, or why it is refused."""
    made = reader.make(measured)
    return made[0] if isinstance(made, tuple) else made


def test_measured_size_is_the_size_of_the_example(chat):
    for examples in (reader(pages(20), chat), reader(_mixed(), chat)):
        for measured, made in zip(*_all(examples)[1:], strict=True):
            assert (measured.tokens, measured.tiles) == (len(made.tokens), len(made.tiles))
            assert np.sum(made.visual_index >= 0) == PER_TILE * len(made.tiles) == PER_TILE * len(made.valid_hw)


def test_an_example_is_a_function_of_seed_and_position(chat):
    one, two = (reader(pages(20), chat) for _ in range(2))
    again = pickle.loads(pickle.dumps(two))  # the way it reaches a worker process
    for position in (33, 5, 0):
        made = one.make(_measure(one, position))
        other = again.make(_measure(again, position))
        for field in dataclasses.fields(made):
            np.testing.assert_array_equal(getattr(made, field.name), getattr(other, field.name))


def test_conversations_of_all_kinds(chat):
    """Several images, several turns, text only, image only: the answers are learned and nothing else."""
    found, _, _ = _all(reader(_mixed(), chat))
    answers = {0: ["0.5", "day 0"], 1: ["Anna 1", "Eve"], 2: ["3"], 3: ["a photograph of 3"]}
    images = {0: 2, 1: 2, 2: 0, 3: 1}
    for number, expected in answers.items():
        example = found[number]
        learned = np.flatnonzero(example.loss_weights) + 1
        texts = chat.decode(example.tokens[learned])
        assert texts == "".join(expected)
        # Every tile shows the conversation's image at that position: the images have the grays 10 i, 10 i + 1, ...
        grays = [int(tile[0, 0, 0]) for tile in example.tiles]
        assert [gray for gray, _ in itertools.groupby(grays)] == [10 * number + j for j in range(images[number])]


def test_text_is_cut_between_turns_together_with_images(chat):
    turns = [turn(f"Question {i}?", f"answer {i} " + "x" * 30, 1) for i in range(4)]
    sizes = ((30, 30), (60, 60), (30, 30), (30, 30))
    records = [Part("long/train", [prepared(0, *turns, sizes=sizes)], "conversation")]
    whole = reader(records, chat, max_text_tokens=1000, packing=dataclasses.replace(PACKING, tokens_per_bin=1000))
    full = whole.make(_measure(whole, 0))
    assert len(full.tiles) == 1 + 4 + 1 + 1 and not full.num_cut
    text_tokens = np.sum(full.visual_index < 0)
    cut = dataclasses.replace(whole, max_text_tokens=int(text_tokens * 0.6))
    example = cut.make(_measure(cut, 0))
    assert example.num_cut and len(example.tiles) == 5 and (example.tiles == full.tiles[:5]).all()
    np.testing.assert_array_equal(example.tokens, full.tokens[: len(example.tokens)])
    assert example.loss_weights[-2] == 1 and example.loss_weights[-1] == 0, "it ends with an answer"


def test_question_order_changes_between_epochs(chat):
    record = {**page(0, np.random.default_rng(0)), "questions": list("abcdefgh"), "answers": list("12345678")}
    examples = reader([record], chat)
    assert len({examples.make(_measure(examples, position)).tokens.tobytes() for position in range(6)}) > 3


def test_bad_records_are_refused_by_name(chat):
    records = [page(i, np.random.default_rng(i), size=(30, 30)) for i in range(12)]
    bad = {
        0: dict(image=b"not a picture"),
        1: dict(questions=[], answers=[]),
        2: dict(answers=["1"] * 9),
        3: dict(questions=["q" * 400], answers=["a"]),
        4: dict(image=records[4]["image"][:-40]),
        5: dict(questions=[None], answers=["a"]),
        6: dict(image=png_image(0, (64, 64))),
    }
    reasons = ["not an image", "0 questions", "9 answers", "limit of 120", "damaged", "NoneType", "4 tiles, a bin"]
    reasons.append("no field 'questions'")
    records = [{**record, **bad.get(i, {})} for i, record in enumerate(records)]
    del records[7]["questions"]
    examples = reader(records, chat, packing=dataclasses.replace(PACKING, tiles_per_bin=3))
    refused = {}
    for position in range(12):
        found = _measure(examples, position)
        if isinstance(found, MeasuredExample):
            found = _make(examples, found)  # where damage of an image shows
        if isinstance(found, Refused):
            refused[found.id] = found
    for i, reason in enumerate(reasons):
        found = refused.pop(f"page-{i}")
        assert found.source == "documents/train" and reason in found.reason
    assert not refused


def test_image_whose_size_differs_from_its_header(chat, monkeypatch):
    examples = reader(pages(1), chat)
    measured = _measure(examples, 0)
    other = PIL.Image.open(io.BytesIO(png_image(0, (21, 99)))).convert("RGB")
    monkeypatch.setattr("alignvlm_jax.data.examples.open_image", lambda *_, **__: other)
    assert "the decoded image has (21, 99) pixels" in _make(examples, measured).reason


def test_numbers_of_records(chat):
    one, two = pages(5), pages(7, seed=1)
    parts = number_parts([Part("a/train", one, "qa"), Part("b/train", two, "qa"), Part("a/train", one, "transcribe")])
    assert [part.first_number for part in parts] == [0, 5, 0]
    assert locate_example(parts, 4) == ("a/train", 4) and locate_example(parts, 11) == ("b/train", 6)
    with pytest.raises(ValueError, match="12"):
        locate_example(parts, 12)


def test_wrong_mixtures(chat):
    with pytest.raises(UserError, match="no parts"):
        dataclasses.replace(reader(pages(1), chat), parts=())
    with pytest.raises(UserError, match="'a/train' is empty"):
        reader([Part("a/train", [], "qa")], chat)
    with pytest.raises(UserError, match="'a/train' in the mixture must be positive, got 0"):
        reader([Part("a/train", pages(1), "qa", weight=0)], chat)
    reader(_mixed(), chat).check_fields()
    with pytest.raises(UserError, match="'conversation' reads the field 'conversation'.*: transcribe, qa, mixed"):
        reader([Part("a/train", pages(1), "conversation")], chat).check_fields()
    with pytest.raises(UserError, match="the task 'mixed' reads the field 'image'.*such records: conversation"):
        reader([Part("a/train", mixed_records(1), "mixed")], chat).check_fields()


def test_anyres_examples_have_the_sources_of_their_visual_tokens(chat):
    tiling = TilingConfig(rule="anyres_max_9", tile_size=32, max_tiles=2, grid_side=3)
    examples = reader(_mixed(), chat, tiling=tiling, packing=dataclasses.replace(PACKING, tiles_per_bin=20))
    for measured in (_measure(examples, position) for position in range(24)):
        example = examples.make(measured)
        visual = int(np.sum(example.visual_index >= 0))
        assert len(example.resampling.sources) == visual
        assert visual == 0 or example.resampling.sources.max() < PER_TILE * len(example.tiles)
        assert (measured.tokens, measured.tiles) == (len(example.tokens), len(example.tiles))


def _mutated(record, rng):
    """Returns the record with a change, deletion, repetition or insertion in its conversation or its images."""
    record = dict(record)

    def spoil(data: bytes) -> bytes:
        data, at, kind = bytearray(data), int(rng.integers(len(data) + 1)), rng.integers(4)
        if kind == 0:
            data[at : at + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 30))]
        elif kind == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 30))]
        else:
            data[at:at] = (b'"', b"[", b"{}", b"null", b"<|image|>", b"\xff", b"\0", b"1e999", b"},{")[rng.integers(9)]
        return bytes(data)

    if record["images"] and rng.random() < 0.5:
        record["images"] = [spoil(image) for image in record["images"]]
    else:
        record["conversation"] = spoil(record["conversation"].encode()).decode(errors="replace")
    return record


def test_two_thousand_damaged_records_end_in_an_example_or_a_refusal(chat):
    rng = np.random.default_rng(0)
    records = [_mutated(record, rng) for _ in range(20) for record in mixed_records(100)]
    examples = reader([Part("fuzz/train", records, "conversation")], chat)
    used = refused = 0
    for position in range(len(records)):
        found = _measure(examples, position)
        if isinstance(found, MeasuredExample):
            measured, found = found, _make(examples, found)
        if isinstance(found, Refused):
            refused += 1
            assert found.reason and found.id.startswith("record-")
        else:
            used += 1
            assert (len(found.tokens), len(found.tiles)) == (measured.tokens, measured.tiles)
    assert used + refused == 2000 and min(used, refused) > 200
