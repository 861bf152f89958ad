"""Chat messages of OpenAI and transformers become the project's own messages and image sources."""

import base64

import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.chat_messages import read_messages

URL = "data:image/png;base64,AAAA"
ANSWER_IMAGE = {"role": "assistant", "content": [{"type": "image", "image": "a"}]}
ASK = {"type": "text", "text": "Total?"}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_every_shape_of_an_image():
    array = np.zeros((2, 2), np.uint8)
    for part, image in [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, URL),
        ({"type": "image_url", "image_url": URL}, URL),
        ({"type": "input_image", "image_url": URL}, URL),
        ({"type": "image", "image": "page.png"}, "page.png"),
        ({"type": "image", "image": array}, array),
        ({"type": "image", "path": "page.png"}, "page.png"),
        ({"type": "image", "url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"type": "image", "base64": base64.b64encode(b"\x89PNG").decode()}, b"\x89PNG"),
    ]:
        chat = read_messages([user(part, ASK)])
        assert chat.messages == [user({"type": "image"}, ASK)]
        assert len(chat.images) == 1 and chat.images[0] is image or chat.images[0] == image


def test_a_conversation_of_several_turns():
    chat = read_messages(
        [
            {"role": "developer", "content": "Be short."},
            user({"type": "input_text", "text": "First"}, {"type": "image", "image": "a"}, "and", {"type": "image"}),
            {"role": "assistant", "content": [{"type": "output_text", "text": "1"}, {"type": "text", "text": "2"}]},
            user({"type": "image", "image": "c"}, ASK),
        ],
        images=["b"],
    )
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in chat.messages[::2]] == ["Be short.", "12"]
    assert [part["type"] for part in chat.messages[1]["content"]] == ["text", "image", "text", "image"]
    assert chat.images == ["a", "b", "c"]
    assert read_messages([{"role": "user", "content": "Hello"}]).messages == [user({"type": "text", "text": "Hello"})]


def test_text_that_looks_like_a_mark_stays_text():
    chat = read_messages([user({"type": "text", "text": "<image> <|image|>"})])
    assert chat.images == [] and chat.messages[0]["content"][0]["text"] == "<image> <|image|>"


@pytest.mark.parametrize(
    "messages, why",
    [
        ("Hello", "messages: expected a list such as"),
        ({"role": "user"}, "messages: expected a list such as"),
        ([], "the list is empty"),
        (["Hello"], "message 1: expected an object with role and content, got str"),
        ([{"role": "robot", "content": "a"}], "message 1: expected a role of user, .*, developer, got 'robot'"),
        ([{"content": "a"}], "got None"),
        ([{"role": ["user"], "content": "a"}], "expected a role"),
        ([{"role": "user"}], "message 1: the content is missing"),
        ([{"role": "user", "content": 7}], "message 1: the content is of type int"),
        ([{"role": "user", "content": "  "}], "message 1: the content is empty"),
        ([user()], "message 1: the content is empty"),
        ([user(ASK), {"role": "user", "content": "a"}], "user and assistant must take turns, got user, user"),
        ([user(ASK), {"role": "assistant", "content": "a"}], "the last one must be the user's"),
        ([{"role": "system", "content": "a"}], "the last one must be the user's"),
        ([user(ASK), {"role": "system", "content": "a"}], "message 2: a system message must be the first"),
        ([user(ASK), {"role": "assistant", "content": None, "tool_calls": [7]}], "message 2: has tool_calls"),
        ([{"role": "tool", "content": "a"}], "message 1: has the role 'tool', but the model calls no tools"),
        ([user(ASK), ANSWER_IMAGE], "only the user can show"),
        ([user({"type": "input_audio", "input_audio": {}})], r"part 1: the model reads text and images, not audio"),
        ([user({"type": "video", "video": "a"})], "not video"),
        ([user({"type": "file", "file": {}})], "not a file"),
        ([user({"type": "smell"})], "part 1: unknown type 'smell'; expected text, image_url or image"),
        ([user(ASK, {"text": "a"})], "message 1, part 2: expected an object with a type"),
        ([user(7)], "expected an object with a type"),
        ([user({"type": "text", "text": 7})], "the text is int, expected a string"),
        ([user({"type": "text"})], "the text is NoneType"),
        ([user({"type": "image_url", "image_url": {}})], "image_url must be text or"),
        ([user({"type": "image_url"})], "has no image_url"),
        ([user({"type": "input_image", "file_id": "f"})], r"names a file at OpenAI \(file_id\)"),
        ([user({"type": "image", "base64": "@"})], "the base64 text of the image cannot be decoded"),
        ([user({"type": "image"})], "there is no image for it"),
    ],
)
def test_refusals_name_the_message(messages, why):
    with pytest.raises(UserError, match=why):
        read_messages(messages)


def test_an_image_without_a_place_is_refused():
    with pytest.raises(UserError, match="1 of the images have no place"):
        read_messages([user(ASK)], images=["a"])
