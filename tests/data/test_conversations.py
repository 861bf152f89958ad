"""Conversations that each task builds from a record."""

import json

import numpy as np
import pytest

from alignvlm_jax.data import conversations
from alignvlm_jax.data.conversations import make_conversation
from alignvlm_jax.errors import UserError
from tests.data.pages import page, prepared, turn

RNG = np.random.default_rng(0)


def test_pages():
    record = page(7, np.random.default_rng(1))
    record["questions"], record["answers"] = ["a?", "b?", "c?"], ["1", "2", "3"]
    rng = np.random.default_rng(0)
    read, images = make_conversation(record, "transcribe", rng)
    instruction = {"type": "text", "text": conversations.TRANSCRIBE_INSTRUCTION}
    assert read[0]["content"] == [{"type": "image"}, instruction] and images == [record["image"]]
    assert read[1:] == [{"role": "assistant", "content": "Invoice 7\nthe total 7.50"}]
    orders = set()
    for _ in range(40):
        asked = make_conversation(record, "qa", rng).messages
        assert sum(part["type"] == "image" for message in asked[::2] for part in message["content"]) == 1
        assert asked[0]["content"][0] == {"type": "image"}
        pairs = tuple((q["content"][-1]["text"], a["content"]) for q, a in zip(asked[::2], asked[1::2], strict=True))
        assert sorted(pairs) == [("a?", "1"), ("b?", "2"), ("c?", "3")]
        orders.add(pairs)
    assert len(orders) == 6
    assert {len(make_conversation(record, "qa", rng, max_turns=2).messages) for _ in range(5)} == {4}
    kinds = [make_conversation(record, "mixed", rng).messages[1]["content"].startswith("Inv") for _ in range(100)]
    assert 30 < sum(kinds) < 70


def test_prepared_record_is_used_unchanged():
    record = prepared(1, turn("Two?", "yes", 2), turn("And?", "no", 1), sizes=((20, 30), (30, 20), (40, 40)))
    messages, images = make_conversation(record, "conversation", RNG)
    assert messages == json.loads(record["conversation"]) and images == record["images"]
    text_only = prepared(2, turn("1 + 1?", "2"))
    assert make_conversation(text_only, "conversation", RNG) == (turn("1 + 1?", "2"), [])


def test_skipped_turns_lose_their_images():
    system = [{"role": "system", "content": "Be brief."}]
    turns = turn("Two?", "yes", 2), turn("And?", "no"), turn("This?", "a cat", 1)
    record = prepared(1, system, *turns, sizes=((20, 30), (30, 20), (40, 40)))
    for max_turns, kept in [(1, 2), (2, 2), (3, 3), (9, 3)]:
        messages, images = make_conversation(record, "conversation", RNG, max_turns)
        assert messages == system + [message for messages in turns[:max_turns] for message in messages]
        assert images == record["images"][:kept]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"images": []}, "no field 'conversation'"),
        ({"conversation": "[]"}, "no field 'images'"),
        ({"conversation": "[", "images": []}, "not valid JSON"),
        ({"conversation": "[" * 100_000, "images": []}, "not valid JSON"),
        ({"conversation": None, "images": []}, "not valid JSON"),
        ({"conversation": '{"role": "user"}', "images": []}, "not a list of messages"),
        ({"conversation": '["hello"]', "images": []}, "not a list of messages"),
        ({"conversation": '[{"role": "user", "content": ["x"]}]', "images": []}, "neither an image nor a text"),
        ({"conversation": '[{"role": "user", "content": [{"type": "video"}]}]', "images": []}, "neither an image"),
        (prepared(1, turn("Two?", "yes", 2), sizes=((9, 9),)), "2 image marks for 1 images"),
        (prepared(1, turn("One?", "yes", 1), sizes=((9, 9), (9, 9))), "1 image marks for 2 images"),
    ],
)
def test_invalid_record_is_refused_with_the_reason(record, message):
    with pytest.raises(UserError, match=message):
        make_conversation(record, "conversation", RNG)
