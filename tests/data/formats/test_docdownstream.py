"""DocDownstream's lines, with images marked <|image|>."""

from alignvlm_jax.data.formats.conversation import Refused
from tests.data.formats.samples import docdownstream_record, read_all, write_lines


def test_a_record(tmp_path):
    (found,) = read_all("docdownstream", write_lines(tmp_path / "train.jsonl", [docdownstream_record(3)]))
    assert (found.id, found.source, found.images) == ("train:0", "DocVQA", ["./3.png"])
    assert found.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question 3?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Answer 3"}]},
    ]


def test_only_the_formats_own_mark_stands_for_an_image(tmp_path):
    messages = [{"role": "user", "content": "<|image|>What is <image>?"}, {"role": "assistant", "content": "A tag."}]
    (found,) = read_all(
        "docdownstream", write_lines(tmp_path / "a.jsonl", [docdownstream_record(0, messages=messages)])
    )
    assert found.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]


def test_invalid_conversation_is_refused(tmp_path):
    lines = [
        docdownstream_record(0, image=5),
        docdownstream_record(1, messages=None),
        [],
        docdownstream_record(2),
    ]
    found = read_all("docdownstream", write_lines(tmp_path / "a.jsonl", lines))
    assert [isinstance(f, Refused) for f in found] == [True, True, True, False]
    assert ["the name of an image is of type int" in found[0].why, "'messages' is missing" in found[1].why] == [
        True,
        True,
    ]
    assert [f.where.rsplit(" ")[-1] for f in found] == ["1", "2", "3", "4"]
