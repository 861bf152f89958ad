"""Refusals of records: each says what the thing is, where it is, and what to do, in less than 1 kB."""

import base64
import json

import pytest

from alignvlm_jax.data.formats.checks import Limits, check
from alignvlm_jax.data.formats.conversation import FormatOptions, Refused
from alignvlm_jax.data.prepare import Recipe, in_processes, prepare
from alignvlm_jax.data.refusal import Refusal
from alignvlm_jax.errors import UserError
from tests.data.formats.samples import image_bytes, read_all, write_images, write_json, write_lines
from tests.data.formats.test_publishers import archive, messages, turns

HUGE = base64.b64encode(bytes(range(256)) * 2000).decode()
ABOUT_IMAGE = {"conversations": turns("<image>Q?", "A.")}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "broken.png").symlink_to("/nowhere/1.png")
    (tmp_path / "album.png").mkdir()
    (tmp_path / "photos.zip").write_bytes(b"PK\3\4")
    return tmp_path


def refusal(folder, record, format="messages"):
    """Returns the refusal of one record, by the format or by the checks."""
    (found,) = read_all(format, write_lines(folder / "a.jsonl", [record]))
    if isinstance(found, Refused):
        return found
    with pytest.raises(Refusal) as error:
        check(found, str(folder), Limits())
    return Refused(found.where, found.id, error.value.kind, str(error.value))


@pytest.mark.parametrize(
    ("record", "kind", "phrases"),
    [
        # Videos and sound: QwenLM/Qwen3-VL#196, modelscope/ms-swift docs (videos, audios), OpenAI's input_audio.
        ({"video": "clip.mp4", "image": None, **ABOUT_IMAGE}, "unreadable record", ["a video", "'video'", "clip.mp4"]),
        ({"videos": [["a.mp4"]], "images": ["0.png"], **ABOUT_IMAGE}, "unreadable record", ["'videos'", "a.mp4"]),
        ({"audio": {"path": "a.wav", "bytes": None}, **ABOUT_IMAGE}, "unreadable record", ["audio", "a.wav"]),
        ({"audios": ["a.wav"], **ABOUT_IMAGE}, "unreadable record", ["audio", "'audios'"]),
        ({"image": "clip.MP4", **ABOUT_IMAGE}, "unreadable record", ["a video where an image belongs", "clip.MP4"]),
        (
            {"messages": messages([{"type": "video_url", "video_url": {"url": "x"}}], "A.")},
            "unreadable record",
            ["a video in a part"],
        ),
        (
            {"messages": messages([{"type": "input_audio", "input_audio": {"data": HUGE}}], "A.")},
            "unreadable record",
            ["audio in a part"],
        ),
        # Images that are elsewhere, or are no images.
        ({"image": "https://a.org/1.png", **ABOUT_IMAGE}, "image path", ["a URL", "https://a.org/1.png", "download"]),
        ({"image": "s3://bucket/1.png", **ABOUT_IMAGE}, "image path", ["s3://bucket/1.png", "--images"]),
        ({"image": "data:image/png;base64" + HUGE, **ABOUT_IMAGE}, "image path", ["a data URL without a comma"]),
        ({"image": "data:image/png;base64,!" + HUGE, **ABOUT_IMAGE}, "unreadable image", ["a data URL (image/png)"]),
        ({"image": "data:video/mp4;base64," + HUGE, **ABOUT_IMAGE}, "unreadable record", ["a video as a data URL"]),
        ({"image": HUGE, **ABOUT_IMAGE}, "unreadable image", ["File name too long", "Base64 text"]),
        ({"image": "broken.png", **ABOUT_IMAGE}, "missing image", ["a link to /nowhere/1.png, which does not exist"]),
        ({"image": "album.png", **ABOUT_IMAGE}, "image path", ["album.png: a folder"]),
        ({"image": "0.PNG", **ABOUT_IMAGE}, "missing image", ["0.png", "capital letters"]),
        # haotian-liu/LLaVA#593, #601: the records of OCR-VQA say .jpg, some files are .gif.
        ({"image": "0.jpg", **ABOUT_IMAGE}, "missing image", ["but 0.png, whose name differs in its ending"]),
        ({"image": "2.png", **ABOUT_IMAGE}, "missing image", ["unpack photos.zip", "--images"]),
        # Marks: hiyouga/LlamaFactory#6135 (an image without a mark), #5883 (the length of a path taken for a number).
        ({"images": ["0.png"], "messages": messages("Q?", "A.")}, "image marks", ["0 image marks for 1 images"]),
        ({"images": "0.png", "messages": messages("<image><image>", "A.")}, "image marks", ["2 image marks for 1"]),
        ({"images": [None], "messages": messages("<image>Q?", "A.")}, "image marks", ["1 image marks for 0 images"]),
        # huggingface/datasets#7137: lists of one struct that do not fit.
        (
            {"messages": {"role": ["user", "assistant"], "content": ["Q?"]}},
            "unreadable record",
            ["different lengths: role 2, content 1"],
        ),
        ({"conversations": "[]"}, "unreadable record", ["'conversations' is missing"]),
        ({"conversations": "[{]"}, "unreadable record", ["'conversations' is text that is not valid JSON"]),
        ({"note": 1, "images": ["0.png"]}, "unreadable record", ["'conversations' is missing", "images, note"]),
        # Two questions in a row stay refused unless one is only an image.
        ({"messages": [*messages("Q?"), *messages("R?", "A.")]}, "roles", ["do not take turns"]),
        ({"prompt": "Q?", "images": ["0.png"]}, "unreadable record", ["the assistant's text is missing"]),
        ({"query": "Q?", "response": "A.", "history": [["one"]]}, "unreadable record", ["'history' is not a pair"]),
    ],
)
def test_a_refusal_says_what_the_thing_is_and_what_to_do(folder, record, kind, phrases):
    found = refusal(folder, record)
    assert found.kind == kind and [phrase for phrase in phrases if phrase not in found.why] == []


def test_lines_of_rejects_stay_under_1_kb(folder):
    """A line used to repeat the base64 text of an image, whatever its size, as in OpenAI's vision fine-tuning files."""
    smile = "\N{GRINNING FACE}"
    records = [
        {"id": HUGE, "image": HUGE, **ABOUT_IMAGE},
        {"id": smile * 9000, "image": smile * 400 + ".png", **ABOUT_IMAGE},
        {"image": "https://" + HUGE, **ABOUT_IMAGE},
        {"image": "\0" * 9000, "conversations": turns("<image>" + "\0" * 9000, "A.")},
        {"conversations": [{"from": HUGE, "value": "x"}]},
        {"messages": messages([{"type": HUGE}], "A.")},
        {HUGE: 1},
        {"video": [HUGE], **ABOUT_IMAGE},
        {"image": {HUGE: 1}, **ABOUT_IMAGE},
    ]
    path = write_json(folder / ("long name " * 20 + ".json"), records)
    recipe = Recipe("llava", (str(path),))
    with pytest.raises(UserError, match="9 of 9 records .* The first is .*record 1: .*File name too long"):
        prepare(recipe, folder / "out", max_rejects=0.5, convert=in_processes(1), progress=False)
    lines = (folder / "out" / "rejects.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(records) and max(map(len, lines)) < 1000
    assert [json.loads(line)["where"].rsplit(" ", 1)[-1] for line in lines] == [str(i + 1) for i in range(len(lines))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.tar"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>\n<body>Sign in</body>", "a web page"),
        (b"PK\3\4" + bytes(40), "a zip archive; unpack it"),
        ("[{}]".encode("utf-16"), "text in UTF-16"),
        (image_bytes(0), "an image"),
        (b"\0\0\0\x18ftypmp42" + bytes(40), None),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, name, content, what):
    """A clone without Git LFS leaves pointers (biomarkersParkinson/paradigma#250), and `wget` leaves error pages."""
    (tmp_path / name).write_bytes(content)
    format = "webdataset" if name.endswith("tar") else "messages"
    (found,) = read_all(format, tmp_path / name)
    assert found.kind == "damaged file" and (what or "") in found.why


def test_a_format_for_other_files_is_recommended(tmp_path):
    write_lines(tmp_path / "a.jsonl", [])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert "--format messages" in read_all("llava", tmp_path / "b.parquet")[0].why
    (tmp_path / "c.tar").write_bytes(json.dumps([ABOUT_IMAGE]).encode())
    assert "JSON text" in read_all("webdataset", tmp_path / "c.tar")[0].why
    assert "tar archive" in read_all("llava", archive("1.jpg")(tmp_path))[0].why
    (tmp_path / "d").mkdir()
    (tmp_path / "links").mkdir()
    for link in ("link.parquet", "links/c.parquet"):
        (tmp_path / link).symlink_to("gone.parquet")
    write_lines(tmp_path / "d" / "a.jsonl", [])
    for entry, found in (
        ("d", "The folder holds 1 .jsonl; perhaps --format llava or docdownstream or messages"),
        ("d/b.parquet", "d holds a.jsonl"),
        ("no/b.parquet", "There is no folder"),
        ("link.parquet", "is a link to gone.parquet, which does not exist"),
        ("links", "links/c.parquet is a link to gone.parquet, which does not exist"),
    ):
        with pytest.raises(UserError, match=found):
            prepare(Recipe("bigdocs", (f"{tmp_path}/{entry}",)), tmp_path / "out")


@pytest.mark.parametrize("field", ["images", "image", "video", "tools", "system", "conversations", "history", "id"])
@pytest.mark.parametrize("brackets", ["[]", ('{"image": ', "}")])
def test_deep_nesting_costs_only_its_record(tmp_path, field, brackets):
    """RFC 8259, section 9: JSON may be nested as deeply as its parser allows, and Python code less deeply."""
    opening, closing = brackets
    deep = opening * 450 + ("1" if closing == "}" else "") + closing * 450
    record = json.dumps({"query": "Q?", "response": "A."} | {field: "DEEP"}).replace('"DEEP"', deep)
    (tmp_path / "a.jsonl").write_text(record + "\n" + json.dumps({"query": "Q?", "response": "A."}))
    for format in ("messages", "docdownstream"):
        found = read_all(format, tmp_path / "a.jsonl")
        assert len(found) == 2
    assert not isinstance(read_all("messages", tmp_path / "a.jsonl")[1], Refused)


def test_file_name_of_a_conversation_is_no_image(tmp_path):
    """A field that names the image of a caption in ImageFolder may name anything in a conversation."""
    (found,) = read_all(
        "llava", write_lines(tmp_path / "a.jsonl", [{"file_name": "a.pdf", "conversations": turns("Q?", "A.")}])
    )
    assert found.images == []


def test_descriptions_next_to_the_data_are_not_data(folder):
    """huggingface/datasets and LLaMA-Factory keep dataset_info.json with the data, macOS an invisible ._NAME."""
    for name in ("dataset_info.json", "dataset_infos.json", "state.json", "._a.jsonl"):
        (folder / name).write_text("{}")
    write_lines(folder / "A.JSONL", [{"image": "0.png", **ABOUT_IMAGE}])
    summary = prepare(Recipe("messages", (str(folder),)), folder / "out", convert=in_processes(1), progress=False)
    assert (summary.accepted, summary.num_rejected) == (1, 0)


def kinds(found):
    return [item.why if isinstance(item, Refused) else len(item.images) for item in found]


def test_files_of_a_sample_that_are_apart_are_named(tmp_path):
    """webdataset/webdataset#407 and ray-project/ray#44068: `tar` without --sort=name writes in the folder's order."""
    path = archive("0.jpg", "1.jpg", "1.txt", "0.txt")(tmp_path)
    first, good, last = kinds(read_all("webdataset", path))
    assert "no caption" in first and good == 1 and "elsewhere in the archive" in last and "--sort=name" in last


def test_samples_that_cannot_be_used(tmp_path):
    path = archive("a.mp4", "a.txt", "b.1.jpg", "b.txt", "b.wav", "c.0.jpg", "c.1.txt", "c.2.txt", "d.jpg", "d.json",
                   d_json=b"{}")(tmp_path)  # fmt: skip
    found = kinds(read_all("webdataset", path))
    expected = ["a video among its files (a.mp4)", "audio among its files", "several texts (1, 2)", "no caption"]
    assert [phrase for phrase, why in zip(expected, found, strict=True) if phrase not in why] == []


def test_a_text_makes_damaged_json_unnecessary(tmp_path):
    path = archive("a.jpg", "a.json", "a.txt", "b.jpg", "b.json", "b.txt", a_json=b"{", b_json=b'{"prompt": "P"}')(
        tmp_path
    )
    found = read_all("webdataset", path, FormatOptions())
    assert [item.messages[1]["content"][0]["text"] for item in found] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    "text",
    [
        '{{"data": [{0}, {1}]}}',
        '\ufeff{{"info": {{"v": 1}}, "train": [\n{0},\n{1}\n], "meta": {{"n": 2}}, "by": "x"}}\n',
        "{0}\n{1}\n",
        "{2}\n{3}\n",
        "{4}\n{1}\n",
    ],
)
def test_forms_of_json(tmp_path, text):
    """OpenGVLab/InternVL#893: records in several lines in a .jsonl; huggingface/datasets: {"data": [...]}."""
    records = [{"id": str(i), "conversations": turns(f"Q{i}?", '"data": [')} for i in range(2)]
    forms = [*map(json.dumps, records), *(json.dumps(record, indent=2) for record in records)]
    forms.append(json.dumps({"data": [{"x": 1}], **records[0]}))
    (tmp_path / "a.jsonl").write_text(text.format(*forms), encoding="utf-8")
    for size in (1, 9):
        found = read_all("messages", tmp_path / "a.jsonl", FormatOptions(records_per_shard=size))
        assert [item.id for item in found] == ["0", "1"]


@pytest.mark.parametrize(
    ("record", "phrase"),
    [
        # OpenAI's and Axolotl's `weight` and `train`, and ms-swift's `loss`, exclude an answer from the loss.
        (
            {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A", "loss": False}]},
            "loss",
        ),
        ({"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A", "weight": 0}]}, "loss"),
        # modelscope/ms-swift, custom dataset, grounding: `objects` fills <ref-object> and <bbox>.
        (
            {
                "messages": messages("<image>Find <ref-object>", "<bbox>"),
                "images": ["0.png"],
                "objects": {"ref": ["a"]},
            },
            "<bbox> and <ref-object>",
        ),
        # ScienceQA: the answer is the number of a choice that the question does not show.
        ({"question": "Q?", "choices": ["red", "blue"], "answer": 1, "image": "0.png"}, "choices that its question"),
        # Marks of other models: QwenLM/Qwen2.5-VL, OpenBMB/MiniCPM-V.
        ({"messages": messages("<|image_pad|>Q?", "A."), "images": ["0.png"]}, "<|image_pad|> of another model"),
        ({"messages": messages("<image_00>Q?", "A."), "images": ["0.png"]}, "<image_00> of another model"),
        # Paths of Windows and of URLs.
        ({"image": "album.png\\a.png", **ABOUT_IMAGE}, "There is album.png/a.png: the record has backslashes"),
        ({"image": "album%2Epng/a.png", **ABOUT_IMAGE}, "There is album.png/a.png: the record has %-escapes"),
        ({"image": "caf\u00e9.png", **ABOUT_IMAGE}, "how its accents are encoded"),
    ],
)
def test_what_looks_right_but_is_not(folder, record, phrase):
    """Each of these was learned without a word, or refused without saying why."""
    (folder / "album.png" / "a.png").write_bytes(image_bytes(0))
    (folder / "cafe\u0301.png").write_bytes(image_bytes(0))
    assert phrase in refusal(folder, record).why


def test_shown_choices_are_read(folder):
    """The choices of ScienceQA and A-OKVQA are often in the question, too."""
    record = {"question": "Red or blue?", "choices": ["red", "blue"], "answer": "blue", "image": "0.png"}
    (found,) = read_all("messages", write_lines(folder / "a.jsonl", [record]))
    assert not isinstance(found, Refused)


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("a.csv", b"image,question,answer\n", "Store a table (CSV, TSV) as JSON lines"),
        ("a.xlsx", b"PK\3\4" + bytes(26) + b"[Content_Types].xml", "an Excel sheet"),
    ],
)
def test_tables(tmp_path, name, content, phrase):
    """hiyouga/LLaMA-Factory reads CSV files; here they are named."""
    (tmp_path / name).write_bytes(content)
    assert phrase in read_all("messages", tmp_path / name)[0].why
