"""Checks of conversations: what is accepted, and what is refused for which reason."""

import io
import json
import os
import struct
import zlib

import PIL.Image
import pytest

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.formats.checks import Limits, check
from alignvlm_jax.data.formats.conversation import IMAGE, Conversation, text_part
from alignvlm_jax.data.refusal import Refusal
from tests.data import pdf_files
from tests.data.formats.samples import image_bytes, write_images
from tests.data.nano_tokenizer import write_chat_folder


def conversation(*turns, images=(), **fields):
    """Returns a conversation of alternating user and assistant turns, each a text or a list of parts."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [text_part(turn)] if isinstance(turn, str) else turn}
        for i, turn in enumerate(turns)
    ]
    fields = {"where": "here", "id": "1", "source": "s", "messages": messages, "images": list(images)} | fields
    return Conversation(**fields)


def about(image, **fields):
    return conversation([IMAGE, text_part("What?")], "This.", images=[image], **fields)


def refusal(found, root, **limits):
    with pytest.raises(Refusal) as error:
        check(found, str(root), Limits(**limits))
    return error.value.kind, str(error.value)


def test_record_keeps_its_image_byte_for_byte(tmp_path):
    write_images(tmp_path, 1)
    record = check(about("0.png"), str(tmp_path), Limits())
    assert record["images"] == [image_bytes(0)] and (record["id"], record["source"]) == ("1", "s")
    assert json.loads(record["conversation"]) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "This."},
    ]


def test_the_pages_of_a_pdf_become_images(tmp_path):
    red, gray = PIL.Image.new("RGB", (30, 40), "red"), PIL.Image.new("L", (30, 40), 128)
    (tmp_path / "a.pdf").write_bytes(pdf_files.of_images(red, gray))
    turn = [IMAGE, text_part("Then"), IMAGE, text_part("What?")]
    record = check(conversation(turn, "This.", images=["a.pdf", "a.pdf#page=2"]), str(tmp_path), Limits())
    # The first mark stands for both pages.
    types = [part["type"] for part in json.loads(record["conversation"])[0]["content"]]
    assert types == ["image", "image", "text", "image", "text"]
    pages = [PIL.Image.open(io.BytesIO(data)) for data in record["images"]]
    assert [(page.format, page.mode) for page in pages] == [("PNG", "RGB"), ("PNG", "L"), ("PNG", "L")]
    assert record["images"][1] == record["images"][2] != record["images"][0]

    for name, why in [
        ("a.pdf#page=3", "has 2 pages, so there is no page 3"),
        ("b.pdf", "17 pages, more than the limit"),
    ]:
        (tmp_path / "b.pdf").write_bytes(pdf_files.of_pages([(9, 9)] * 17))
        assert why in refusal(about(name), tmp_path)[1]
    assert refusal(about(pdf_files.encrypted()), tmp_path) == (
        "unreadable image",
        "image 1: a PDF with a password. Remove it with `qpdf --decrypt --password=PASSWORD FILE page.pdf`",
    )


def test_text_typed_by_a_user_stays_text(tmp_path):
    chat = ChatTokenizer.from_folder(write_chat_folder(tmp_path / "tokenizer"))
    typed = "<image> <|image|> <|end|><|assistant|>"
    record = check(conversation([IMAGE, text_part(typed)], "ok", images=[image_bytes()]), str(tmp_path), Limits())
    encoded = chat.encode(json.loads(record["conversation"]), [2])
    assert (encoded.tokens == chat.image_id).sum() == 2 == (encoded.visual_index >= 0).sum()


@pytest.mark.parametrize(
    ("turns", "kind", "why"),
    [
        ((), "empty conversation", "no messages"),
        (("Hello?",), "roles", "the last message has the role user"),
        (("Hello?", "Yes.", "And?"), "roles", "the last message has the role user"),
        (("Hello?", ""), "empty conversation", "message 2 (role assistant) is empty"),
        (("Hello?", " \n"), "empty conversation", "message 2"),
        (([], "Yes."), "empty conversation", "message 1 (role user) is empty"),
        ((" ", "Yes."), "empty conversation", "message 1"),
        (("Hel\0lo?", "Yes."), "text encoding", "NUL"),
        (("Hello?", "Y\ud800s."), "text encoding", "surrogate"),
        (("Hello?", [IMAGE, text_part("see")]), "image marks", "(role assistant) shows an image"),
        (([IMAGE], "Yes."), "image marks", "1 image marks for 0 images"),
    ],
)
def test_refused_conversations(tmp_path, turns, kind, why):
    found_kind, found_why = refusal(conversation(*turns), tmp_path)
    assert found_kind == kind and why in found_why


def test_roles_take_turns_after_an_optional_system(tmp_path):
    def spoken(*roles):
        return conversation(messages=[{"role": role, "content": [text_part("x")]} for role in roles])

    for roles in ("user assistant", "system user assistant", "user assistant user assistant"):
        assert check(spoken(*roles.split()), str(tmp_path), Limits())
    for roles in ("assistant", "user user assistant", "user assistant assistant", "user system assistant"):
        assert refusal(spoken(*roles.split()), tmp_path)[0] == "roles"
    assert refusal(spoken("system"), tmp_path)[0] == "empty conversation"


def test_ids_and_sources_are_texts_too(tmp_path):
    assert refusal(conversation("a", "b", id="x\0"), tmp_path)[0] == "text encoding"
    assert refusal(conversation("a", "b", source="\udfff"), tmp_path)[0] == "text encoding"


def test_more_or_fewer_marks_than_images(tmp_path):
    found = conversation([IMAGE, text_part("What?")], "This.", images=[image_bytes(0), image_bytes(1)])
    kind, why = refusal(found, tmp_path)
    assert kind == "image marks" and "the conversation has 1 image marks for 2 images" in why and "<image>" in why


def bomb(width, height):
    """Returns a PNG of a few bytes that claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"GIF89a", "image 1"),
        (b"<html>not found</html>", "not an image"),
        (image_bytes(0)[:60], "damaged"),
        (image_bytes(0, format="JPEG")[:-200], "damaged"),
        (bomb(10_000, 10_000), "more than the limit"),
        (bomb(2**31 - 1, 2**31 - 1), "pixels"),
    ],
)
def test_images_that_do_not_open(tmp_path, data, why):
    kind, found = refusal(about(data), tmp_path)
    assert kind == "unreadable image" and why in found


def test_the_pixel_limit_can_be_set(tmp_path):
    assert check(about(image_bytes(0)), str(tmp_path), Limits(max_pixels=96))
    assert "12 x 8 pixels, more than the limit of 95" in refusal(about(image_bytes(0)), tmp_path, max_pixels=95)[1]


def test_the_content_of_an_image_counts_not_its_name(tmp_path):
    (tmp_path / "really_png.jpg").write_bytes(image_bytes(0))
    assert check(about("really_png.jpg"), str(tmp_path), Limits())["images"] == [image_bytes(0)]
    (tmp_path / "text.png").write_text("not a picture")
    assert refusal(about("text.png"), tmp_path)[0] == "unreadable image"


def test_enormous_records(tmp_path):
    noise = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 90).save(noise, "BMP")
    size = len(noise.getvalue())
    (tmp_path / "noise.bmp").write_bytes(noise.getvalue())
    for image in (noise.getvalue(), "noise.bmp"):
        assert refusal(about(image), tmp_path, max_record_bytes=size)[0] == "too large"
        assert check(about(image), str(tmp_path), Limits(max_record_bytes=size + 300))
    two = conversation([IMAGE, IMAGE], "ok", images=[noise.getvalue()] * 2)
    assert refusal(two, tmp_path, max_record_bytes=size + 300)[0] == "too large"
    assert refusal(conversation("x" * 1000, "y"), tmp_path, max_record_bytes=1000)[0] == "too large"


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path, 1)
    return write_images(tmp_path / "root", 1)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("1.png", "missing image", "1.png: no such file"),
        ("a/b/1.png", "missing image", "no such file"),
        ("", "image path", "a folder, expected an image file"),
        (".", "image path", "a folder, expected an image file"),
        ("../0.png", "image path", "outside the image root"),
        ("x/../../0.png", "image path", "outside the image root"),
        ("/etc/passwd", "image path", "outside the image root"),
        ("a\0b.png", "image path", "NUL"),
        ("\ud800.png", "image path", "not a valid path"),
        ("x" * 5000, "unreadable image", "File name too long"),
        ("0.png/1.png", "unreadable image", "Not a directory"),
    ],
)
def test_paths_to_nothing_or_outside_the_root(root, name, kind, why):
    found_kind, found_why = refusal(about(name), root)
    assert found_kind == kind and why in found_why


def test_paths_that_stay_inside(root, monkeypatch):
    for name in ("0.png", "./0.png", "a/../0.png", str(root / "0.png")):
        assert check(about(name), str(root), Limits())["images"] == [image_bytes(0)]
    monkeypatch.chdir(root.parent)
    assert check(about(str(root / "0.png")), "root", Limits())["images"] == [image_bytes(0)]
    assert check(about("0.png"), "root", Limits())["images"] == [image_bytes(0)]


def test_links(root):
    (root / "inside.png").symlink_to("0.png")
    (root / "outside.png").symlink_to("../0.png")
    (root / "folder").symlink_to("..")
    (root / "loop.png").symlink_to("pool.png")
    (root / "pool.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("gone.png")
    assert check(about("inside.png"), str(root), Limits())
    for name in ("outside.png", "folder/0.png"):
        kind, why = refusal(about(name), root)
        assert kind == "image path" and "leads out of the image root" in why and "--follow-links" in why
        assert check(about(name), str(root), Limits(follow_links=True))["images"] == [image_bytes(0)]
    assert refusal(about("loop.png"), root) == ("image path", "loop.png: a loop of symbolic links")
    assert refusal(about("loop.png"), root, follow_links=True)[0] == "image path"
    assert refusal(about("dangling.png"), root)[0] == "missing image"


def test_a_pipe_is_not_waited_for(root):
    os.mkfifo(root / "pipe.png")
    assert refusal(about("pipe.png"), root)[0] == "image path"
