"""The Hub's conversations in Parquet, in all three schemas."""

import pytest

from alignvlm_jax.data.formats.conversation import Refused
from tests.data.formats.samples import embedded, image_bytes, llava_record, messages_row, read_all, write_parquet

IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def read_one(tmp_path, row):
    (found,) = read_all("messages", write_parquet(tmp_path / "hub.parquet", [row]))
    return found


def test_messages_with_marks_in_their_text(tmp_path):
    found = read_one(tmp_path, messages_row(3, id="m3", source="docs"))
    assert (found.id, found.source, found.images) == ("m3", "docs", [image_bytes(3)])
    assert found.messages == [
        {"role": "user", "content": [IMAGE, text("Question 3?")]},
        {"role": "assistant", "content": [text("Answer 3")]},
    ]


def parts(*contents):
    """Returns parts as Parquet returns them, with every field in each of them."""
    return [
        {"type": "image", "text": None, "index": content}
        if isinstance(content, int) or content is None
        else {"type": "text", "text": content, "index": None}
        for content in contents
    ]


def test_messages_with_parts(tmp_path):
    messages = [
        {"role": "user", "content": parts(None, "What does <image> mean?")},
        {"role": "assistant", "content": parts("An image.")},
    ]
    found = read_one(tmp_path, messages_row(0, messages=messages))
    assert found.messages[0]["content"] == [IMAGE, text("What does <image> mean?")]  # typed by the user, so text
    assert found.messages[1] == {"role": "assistant", "content": [text("An image.")]}


def test_parts_that_number_their_images(tmp_path):
    messages = [
        {"role": "user", "content": parts(1, "before", 0)},
        {"role": "assistant", "content": parts("Yes.")},
    ]
    found = read_one(tmp_path, {"images": [embedded(5), embedded(6)], "messages": messages})
    assert found.images == [image_bytes(6), image_bytes(5)]
    found = read_one(tmp_path, {"images": [embedded(5)], "messages": messages})
    assert isinstance(found, Refused) and found.kind == "image marks"


def test_the_cauldron(tmp_path):
    texts = [{"user": f"Q{i}", "assistant": f"A{i}", "source": "vqa"} for i in range(2)]
    found = read_one(tmp_path, {"images": [embedded(1), embedded(2)], "texts": texts})
    assert found.images == [image_bytes(1), image_bytes(2)] and found.source == "hub"
    assert found.messages == [
        {"role": "user", "content": [IMAGE, IMAGE, text("Q0")]},
        {"role": "assistant", "content": [text("A0")]},
        {"role": "user", "content": [text("Q1")]},
        {"role": "assistant", "content": [text("A1")]},
    ]


def test_llava_in_parquet(tmp_path):
    row = {"id": "x", "image": embedded(4), "data_source": "mix", "conversations": llava_record(4)["conversations"]}
    found = read_one(tmp_path, row)
    assert (found.id, found.source, found.images) == ("x", "mix", [image_bytes(4)])
    assert found.messages[0]["content"] == [IMAGE, text("Question 4?")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"id": "a", "note": "nothing"}, "neither messages"),
        (messages_row(0, messages=[{"role": "narrator", "content": "x"}]), "'narrator'"),
        (messages_row(0, messages=[{"role": None, "content": parts("x")}]), "None, expected one of"),
        (messages_row(0, messages=[{"role": "user", "content": None}]), "text is missing"),
        (
            messages_row(0, messages=[{"role": "user", "content": [{"type": "video"}]}]),
            "'video', expected 'text' or 'image'",
        ),
        (messages_row(0, messages=[{"role": "user", "content": [{"type": "text"}]}]), "part is missing"),
        ({"texts": [{"user": "a"}]}, "assistant's text is missing"),
    ],
)
def test_invalid_conversation_is_refused(tmp_path, row, why):
    found = read_one(tmp_path, row)
    assert isinstance(found, Refused) and why in found.why
    assert found.where.endswith("hub.parquet: row 1")
