"""LLaVA's records: one image, several images, none, and marks anywhere."""

import pytest

from alignvlm_jax.data.formats.conversation import FormatOptions, Refused
from tests.data.formats.samples import llava_record, read_all, write_json, write_lines

IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def read_one(tmp_path, record, **options):
    (found,) = read_all("llava", write_json(tmp_path / "mix.json", [record]), FormatOptions(**options))
    return found


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_a_record_with_an_image(tmp_path):
    found = read_one(tmp_path, llava_record(3))
    assert (found.id, found.source, found.images) == ("r3", "mix", ["3.png"])
    assert found.messages == [
        {"role": "user", "content": [IMAGE, text("Question 3?")]},
        {"role": "assistant", "content": [text("Answer 3 ✓")]},
    ]


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("<image>", [IMAGE]),
        ("<image>\n<image>\nWhich is larger?", [IMAGE, IMAGE, text("Which is larger?")]),
        ("Is <image> like\n<image>?", [text("Is "), IMAGE, text(" like\n"), IMAGE, text("?")]),
        ("No image.\n", [text("No image.\n")]),
        ("<|eot_id|><|image|>", [text("<|eot_id|><|image|>")]),
        ("<Image> < image>", [text("<Image> < image>")]),
    ],
)
def test_marks_anywhere_in_the_users_text(tmp_path, written, parts):
    assert read_one(tmp_path, {"conversations": turns(written, "Yes.")}).messages[0]["content"] == parts


def test_a_mark_in_an_answer_is_text(tmp_path):
    found = read_one(tmp_path, {"conversations": turns("Which tag?", "<image>")})
    assert found.messages[1]["content"] == [text("<image>")]


def test_images_in_a_list_many_turns_and_a_system(tmp_path):
    conversations = [{"from": "system", "value": "Be brief."}, *turns("<image>A?", "a", "<image>B?", "b")]
    found = read_one(tmp_path, {"id": 7, "image": ["a.png", "b.png"], "conversations": conversations})
    assert found.id == "7" and found.images == ["a.png", "b.png"]
    assert [message["role"] for message in found.messages] == ["system", *["user", "assistant"] * 2]
    assert read_one(tmp_path, {"images": ["a.png"], "conversations": turns("<image>", "b")}).images == ["a.png"]


def test_a_record_without_image_id_or_source(tmp_path):
    found = read_one(tmp_path, {"conversations": turns("Two and two?", "Four.")})
    assert (found.id, found.source, found.images) == ("mix:0", "mix", [])
    assert read_one(tmp_path, llava_record(1, data_source="chartqa")).source == "chartqa"
    assert read_one(tmp_path, llava_record(1, data_source="chartqa"), source="mine").source == "mine"


@pytest.mark.parametrize(
    ("record", "kind", "why"),
    [
        (17, "unreadable record", "record is of type int"),
        ({"id": "x"}, "unreadable record", "'conversations' is missing"),
        ({"conversations": "hello"}, "unreadable record", "'conversations' is of type str"),
        ({"conversations": ["hello"]}, "unreadable record", "turn is of type str"),
        ({"conversations": turns("a", 5)}, "unreadable record", "text is of type int"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "roles", "'robot', expected one of system"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "roles", "expected one of"),
        ({"image": {"name": "a"}, "conversations": turns("a", "b")}, "unreadable record", "expected bytes or path"),
        ({"image": [7], "conversations": turns("a", "b")}, "unreadable record", "name of an image is of type int"),
        ({"video": "a.mp4", "conversations": turns("<image>a", "b")}, "unreadable record", "video"),
    ],
)
def test_invalid_conversation_is_refused_with_the_reason(tmp_path, record, kind, why):
    found = read_one(tmp_path, record)
    assert isinstance(found, Refused) and found.kind == kind and why in found.why
    assert found.where.endswith("mix.json: record 1")


def test_one_bad_record_costs_no_other(tmp_path):
    path = tmp_path / "mix.json"
    write_json(path, [llava_record(i) for i in range(5)])
    path.write_bytes(path.read_bytes().replace(b'"r1"', b'"r1').replace(b"Question 3", b"Question \xff"))
    found = read_all("llava", path)
    assert [getattr(f, "kind", None) for f in found] == [None, "unreadable record", None, "text encoding", None]
    assert "not valid JSON" in found[1].why and "not UTF-8" in found[3].why


def test_lines_are_read_as_well(tmp_path):
    path = write_lines(tmp_path / "mix.jsonl", [llava_record(i) for i in range(3)])
    path.write_text(path.read_text() + "\n\n{\n")
    found = read_all("llava", path, FormatOptions(records_per_shard=2))
    assert [getattr(f, "kind", f.id) for f in found] == ["r0", "r1", "r2", "unreadable record"]
    assert found[3].where.endswith("record 4")


def test_a_mixture(tmp_path):
    write_json(tmp_path / "a.json", [llava_record(i) for i in range(10)])
    write_lines(tmp_path / "b.jsonl", [llava_record(10 + i) for i in range(4)])
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n"
        "  - {json_path: a.json, sampling_strategy: 'first:3'}\n"
        "  - {json_path: a.json, sampling_strategy: 'end:15%'}\n"
        "  - {json_path: b.jsonl}\n"
    )
    found = read_all("llava", tmp_path / "mix.yaml", FormatOptions(records_per_shard=2))
    assert [f.id for f in found] == [f"r{i}" for i in (0, 1, 2, 8, 9, 10, 11, 12, 13)]
    assert {f.source for f in found} == {"a", "b"}
