"""Each publisher's layout, in a miniature with the fields as published; docs/data.md has the same table."""

import base64
import json
import pathlib
import re
import tarfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignvlm_jax.data.formats.checks import Limits, check
from alignvlm_jax.data.formats.conversation import FormatOptions, Refused
from alignvlm_jax.data.prepare import Recipe, in_processes, prepare
from alignvlm_jax.errors import UserError
from tests.data.formats.samples import IMAGE_TYPE, add_file, embedded, image_bytes, read_all, write_images

Writer = Callable[[pathlib.Path], pathlib.Path]
TEXTS = pa.list_(pa.string())
BASE64 = [base64.b64encode(image_bytes(i)).decode() for i in range(4)]


class Publisher(NamedTuple):
    """A layout: its format, a function that writes it, and its conversations, with [N] for the image number N.

    Attributes:
      format: value of --format.
      source: where the publisher shows the layout.
      write: writes the files to a folder that holds 0.png ... 3.png, and returns the input.
      conversations: "role: text" for each message of each record.
      options: settings of the format.
    """

    format: str
    source: str
    write: Writer
    conversations: list[list[str]]
    options: FormatOptions = FormatOptions()  # noqa: RUF009


def lines(*records: Mapping[str, Any], name: str = "train.jsonl") -> Writer:
    """Returns a function that writes records as JSON lines."""

    def write(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder / name

    return write


def document(content: Any, name: str = "train.json") -> Writer:
    """Returns a function that writes one JSON document."""

    def write(folder: pathlib.Path) -> pathlib.Path:
        (folder / name).write_text(json.dumps(content, indent=2))
        return folder / name

    return write


def parquet(schema: Mapping[str, pa.DataType], *rows: Mapping[str, Any]) -> Writer:
    """Returns a function that writes rows as Parquet."""

    def write(folder: pathlib.Path) -> pathlib.Path:
        pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(schema.items())), folder / "train.parquet")
        return folder / "train.parquet"

    return write


def archive(*names: str, **contents: bytes) -> Writer:
    """Returns a function that writes an archive in which N.* images have the number N of the name's last digit."""

    def write(folder: pathlib.Path) -> pathlib.Path:
        with tarfile.open(folder / "00000.tar", "w") as file:
            for name in names:
                is_image = name.lower().endswith(("jpg", "png"))
                data = image_bytes(int((re.findall(r"\d", name) or [0])[-1])) if is_image else name.encode()
                add_file(file, name, contents.get(name.replace(".", "_"), data))
        return folder / "00000.tar"

    return write


def turns(*values: str, names: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": names[i % 2], "value": value} for i, value in enumerate(values)]


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def part(text: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text} if text is not None else {"type": "image", **fields}


LIST_OF_TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
LIST_OF_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
LIST_OF_TEXTS = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
LIST_OF_PARTS = pa.list_(pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())]))
ONE = [["user: [0]Q?", "assistant: A."]]

PUBLISHERS = {
    "llava": Publisher(
        "llava",
        "haotian-liu/LLaVA docs/Finetune_Custom_Data.md",
        document(
            [
                {"id": "1", "image": "0.png", "conversations": turns("<image>\nQ?", "A.", "And?", "B.")},
                {"id": "2", "model": "", "conversations": turns("Two and two?", "Four.")},
            ]
        ),
        [["user: [0]Q?", "assistant: A.", "user: And?", "assistant: B."], ["user: Two and two?", "assistant: Four."]],
    ),
    "llava-table": Publisher(
        "llava",
        "QwenLM/Qwen3-VL#196, zjysteven/lmms-finetune#5: every record has every column",
        document(
            [
                {"image": None, "images": ["1.png", "0.png"], "video": "",
                 "conversations": turns("<image><image>Q?", "A.")},
                {"image": "0.png", "images": [], "video": [], "audio": None, "conversations": turns("<image>Q?", "A.")},
                {"image": float("nan"), "images": [""], "videos": [None], "conversations": turns("Q?", "A.")},
            ]
        ),
        [["user: [1][0]Q?", "assistant: A."], *ONE, ["user: Q?", "assistant: A."]],
    ),
    "llava-onevision": Publisher(
        "messages",
        "lmms-lab/LLaVA-OneVision-Data on the Hub",
        parquet(
            {"id": pa.string(), "image": IMAGE_TYPE, "conversations": LIST_OF_TURNS, "data_source": pa.string()},
            {"id": "1", "image": embedded(0), "conversations": turns("<image>\nQ?", "A."), "data_source": "iam"},
            {"id": "2", "image": None, "conversations": turns("Q?", "A."), "data_source": "magpie"},
        ),
        [*ONE, ["user: Q?", "assistant: A."]],
    ),
    "llava-interleave": Publisher(
        "messages",
        "lmms-lab/M4-Instruct-Data on the Hub, as converted to Parquet: a column for each image",
        parquet(
            {"id": pa.string(), **{f"image_{i}": IMAGE_TYPE for i in (10, 1, 2)}, "conversations": LIST_OF_TURNS},
            {"id": "1", "image_1": embedded(1), "image_2": embedded(2), "image_10": embedded(3),
             "conversations": turns("<image><image>Q?<image>", "A.")},
            {"id": "2", "image_1": embedded(0), "conversations": turns("<image>Q?", "A.")},
        ),
        [["user: [1][2]Q?[3]", "assistant: A."], *ONE],
    ),
    "sharegpt4v": Publisher(
        "llava",
        "Lin-Chen/ShareGPT4V on the Hub, sharegpt4v_instruct_gpt4-vision_cap100k.json",
        document([{"id": "000000000009", "image": "0.png", "conversations": turns("Q?\n<image>", "A.")}]),
        [["user: Q?[0]", "assistant: A."]],
    ),
    "sharegpt": Publisher(
        "llava",
        "hiyouga/LLaMA-Factory data/README.md, data/glaive_toolcall_en_demo.json",
        document(
            [
                {
                    "conversations": [
                        {"from": "human", "value": "<image>Q?"},
                        {"from": "function_call", "value": '{"name": "look"}'},
                        {"from": "observation", "value": "seen"},
                        {"from": "gpt", "value": "A."},
                    ],
                    "images": ["0.png"],
                    "system": "Be brief.",
                    "tools": '[{"name": "look"}]',
                }
            ]
        ),
        [
            [
                'system: Be brief.\n\n[{"name": "look"}]',
                "user: [0]Q?",
                'assistant: {"name": "look"}',
                "user: seen",
                "assistant: A.",
            ]
        ],
    ),
    "llama-factory": Publisher(
        "messages",
        "hiyouga/LLaMA-Factory data/mllm_demo.json",
        document(
            [
                {"messages": messages("<image>Q?", "A.", "And?<image>", "B."), "images": ["0.png", "1.png"]},
                {"messages": [{"role": "system", "content": ""}, *messages("Q?", "A.")], "images": [], "videos": []},
            ]
        ),
        [["user: [0]Q?", "assistant: A.", "user: And?[1]", "assistant: B."], ["user: Q?", "assistant: A."]],
    ),
    "llama-factory-string": Publisher(
        "messages",
        "hiyouga/LlamaFactory#5883: one image as text instead of a list",
        lines({"messages": messages("<image>Q?", "A."), "images": "0.png"}),
        ONE,
    ),
    "llama-factory-alpaca": Publisher(
        "messages",
        "hiyouga/LLaMA-Factory data/README.md, multimodal alpaca",
        document(
            [
                {"instruction": "<image>Q?", "input": "Now.", "output": "A.", "images": ["0.png"], "system": "",
                 "history": [["Hello?", "Hello."]]},
                {"instruction": "Q?", "input": "", "output": "A.", "images": ["0.png"], "history": []},
            ]
        ),
        [["user: Hello?", "assistant: Hello.", "user: [0]Q?\nNow.", "assistant: A."], *ONE],
    ),
    "swift-messages": Publisher(
        "messages",
        "modelscope/ms-swift docs/source_en/Customization/Custom-dataset.md",
        lines(
            {"messages": [{"role": "system", "content": "S."}, *messages("<image><image>Q?", "A.")],
             "images": ["0.png", {"path": "1.png", "bytes": None}]},
            {"messages": [{"role": "user", "content": "Q?"}, {"role": "tool_call", "content": "f()"},
                          {"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"},
                          {"role": "assistant", "content": "A."}]},
        ),
        [
            ["system: S.", "user: [0][1]Q?", "assistant: A."],
            ["user: Q?", "assistant: f()", "user: 1\n2", "assistant: A."],
        ],
    ),
    "swift-query": Publisher(
        "messages",
        "modelscope/ms-swift docs, InternVL best practice; modelscope/ms-swift#4895 (an empty path)",
        lines(
            {"query": "Image-1: <image>\nImage-2: <image>\nQ?", "response": "A.",
             "history": [["<image>First?", "One."], ["C", "D"]], "images": ["0.png", "1.png", "2.png"]},
            {"query": "Q?", "response": "A.", "images": [""], "system": None, "history": None, "tools": "[]"},
        ),
        [
            ["user: [0]First?", "assistant: One.", "user: C", "assistant: D",
             "user: Image-1: [1]\nImage-2: [2]\nQ?", "assistant: A."],
            ["user: Q?", "assistant: A."],
        ],
    ),
    "swift-img-tags": Publisher(
        "messages",
        "modelscope/ms-swift docs, Qwen-VL best practice; QwenLM/Qwen-VL README.md",
        lines(
            {"query": "Image-1: <img>1.png</img>\nQ?", "response": "A.",
             "history": [["<img>0.png</img>First?", "One."]]},
            {"conversations": turns("Picture 1: <img>0.png</img>\nQ?", "A.", names=("user", "assistant"))},
        ),
        [
            ["user: [0]First?", "assistant: One.", "user: Image-1: [1]\nQ?", "assistant: A."],
            ["user: Picture 1: [0]\nQ?", "assistant: A."],
        ],
    ),
    "swift-sharegpt": Publisher(
        "messages",
        "modelscope/ms-swift docs/source_en/Customization/Custom-dataset.md",
        lines(
            {"conversation": [{"human": "<image>Q?", "assistant": "A."}, {"human": "C", "assistant": "D"}],
             "system": "S.", "images": ["0.png"]}
        ),
        [["system: S.", "user: [0]Q?", "assistant: A.", "user: C", "assistant: D"]],
    ),
    "internvl": Publisher(
        "llava",
        "OpenGVLab/InternVL docs, get_started/chat_data_format (the answer is under 'text')",
        lines(
            {"id": 0, "image": ["0.png", "1.png"], "width_list": [12, 12], "height_list": [8, 8],
             "conversations": [{"from": "human", "value": "Image-1: <image>\nImage-2: <image>\nQ?"},
                               {"from": "gpt", "text": "A."}]},
            {"id": 1, "image": "0.png", "width": 12, "height": 8, "conversations": turns("<image>\nQ?", "A.")},
            {"id": 2, "conversations": turns("Q?", "A.")},
        ),
        [["user: Image-1: [0]\nImage-2: [1]\nQ?", "assistant: A."], *ONE, ["user: Q?", "assistant: A."]],
    ),
    "qwen-vl": Publisher(
        "messages",
        "QwenLM/Qwen2.5-VL README.md, messages with parts that name their images",
        lines(
            {"messages": messages([part(image="0.png", max_pixels=9), part("Q?")], [part("A.")])},
            {"messages": messages([{"image": "1.png"}, {"text": "Q?"}, {"image": "0.png"}], "A.")},
        ),
        [*ONE, ["user: [1]Q?[0]", "assistant: A."]],
    ),
    "openai": Publisher(
        "messages",
        "OpenAI, guide to vision fine-tuning: data URLs, and an image in a message of its own",
        lines(
            {"messages": [
                {"role": "system", "content": "S."},
                {"role": "user", "content": "Q?"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {
                    "url": f"data:image/png;base64,{BASE64[0]}", "detail": "low"}}]},
                {"role": "assistant", "content": "A."}]},
            {"messages": messages([{"type": "input_image", "image_url": f"data:image/png;base64,{BASE64[0]}"},
                                   {"type": "input_text", "text": "Q?"}], [{"type": "output_text", "text": "A."}])},
        ),
        [["system: S.", "user: Q?[0]", "assistant: A."], *ONE],
    ),
    "oumi": Publisher(
        "messages",
        "oumi-ai/oumi docs/resources/datasets/data_formats.md",
        lines({"messages": messages([{"type": "image_path", "content": "0.png"},
                                     {"type": "text", "content": "Q?"}], "A.")}),
        ONE,
    ),
    "anthropic": Publisher(
        "messages",
        "Anthropic, guide to vision: base64 sources",
        lines({"system": "S.", "messages": messages(
            [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64[0]}}, part("Q?")],
            "A.")}),
        [["system: S.", "user: [0]Q?", "assistant: A."]],
    ),
    "h4-vsft": Publisher(
        "messages",
        "HuggingFaceH4/llava-instruct-mix-vsft on the Hub",
        parquet(
            {"messages": pa.list_(pa.struct([("content", LIST_OF_PARTS), ("role", pa.string())])),
             "images": pa.list_(IMAGE_TYPE)},
            {"messages": messages([part("What is <image>?"), part(index=1), part(index=0)], [part("A.")]),
             "images": [embedded(0), embedded(1)]},
        ),
        [["user: What is <image>?[1][0]", "assistant: A."]],
    ),
    "trl": Publisher(
        "messages",
        "huggingface/trl docs/source/dataset_formats.md, prompt and completion",
        lines({"prompt": messages("<image>Q?"), "completion": [{"role": "assistant", "content": "A."}],
               "images": ["0.png"]}),
        ONE,
    ),
    "tiger-lab": Publisher(
        "messages",
        "TIGER-Lab/llava-data on the Hub",
        parquet(
            {"id": pa.string(), "images": pa.list_(IMAGE_TYPE), "conversation": LIST_OF_MESSAGES},
            {"id": "1", "images": [embedded(0), None], "conversation": messages("<image>Q?", "A.")},
        ),
        ONE,
    ),
    "cauldron": Publisher(
        "messages",
        "HuggingFaceM4/the_cauldron on the Hub",
        parquet(
            {"images": pa.list_(IMAGE_TYPE), "texts": LIST_OF_TEXTS},
            {"images": [embedded(0)], "texts": [{"user": "Q?", "assistant": "A.", "source": "vqav2"}]},
        ),
        ONE,
    ),
    "docmatix": Publisher(
        "messages",
        "HuggingFaceM4/Docmatix on the Hub",
        parquet(
            {"images": pa.list_(IMAGE_TYPE), "texts": LIST_OF_TEXTS},
            {"images": [embedded(1), embedded(0)], "texts": [
                {"user": "Q?", "assistant": "A.", "source": "PDFA key: 1"}, {"user": "C", "assistant": "D"}]},
        ),
        [["user: [1][0]Q?", "assistant: A.", "user: C", "assistant: D"]],
    ),
    "finevision": Publisher(
        "messages",
        "HuggingFaceM4/FineVision on the Hub",
        parquet(
            {"images": pa.list_(IMAGE_TYPE), "source": pa.string(), "relevance_ratings": pa.list_(pa.int64()),
             "texts": pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))},
            {"images": [embedded(0)], "texts": [{"user": "Q?", "assistant": "A."}], "source": "ai2d",
             "relevance_ratings": [5]},
        ),
        ONE,
    ),
    "m3it": Publisher(
        "messages",
        "MMInstruction/M3IT on the Hub, M3IT.py",
        lines({"instruction": "Q?", "inputs": "", "outputs": "A.", "image_base64_str": [BASE64[0]]}),
        ONE,
    ),
    "m3it-parquet": Publisher(
        "messages",
        "HuggingFaceM4/M3IT on the Hub",
        parquet(
            {"instruction": pa.string(), "inputs": pa.string(), "outputs": pa.string(), "image": IMAGE_TYPE},
            {"instruction": "Do.", "inputs": "Q?", "outputs": "A.", "image": embedded(0)},
        ),
        [["user: [0]Do.\nQ?", "assistant: A."]],
    ),
    "pixmo-docs": Publisher(
        "messages",
        "allenai/pixmo-docs on the Hub",
        parquet(
            {"image": IMAGE_TYPE, "image_id": pa.string(),
             "questions": pa.struct([("question", TEXTS), ("answer", TEXTS)])},
            {"image": embedded(0), "image_id": "i", "questions": {"question": ["Q?", "C"], "answer": ["A.", "D"]}},
        ),
        [["user: [0]Q?", "assistant: A.", "user: C", "assistant: D"]],
    ),
    "datasets-sequence": Publisher(
        "messages",
        "huggingface/datasets#7137: a Sequence of named fields is a struct of lists, also a nested one",
        parquet(
            {"images": pa.struct([("bytes", pa.list_(pa.binary())), ("path", TEXTS)]),
             "messages": pa.struct([("role", TEXTS),
                                    ("content", pa.list_(pa.struct([("type", TEXTS), ("text", TEXTS)])))])},
            {"images": {"bytes": [image_bytes(0)], "path": [None]},
             "messages": {"role": ["user", "assistant"],
                          "content": [{"type": ["image", "text"], "text": [None, "Q?"]},
                                      {"type": ["text"], "text": ["A."]}]}},
        ),
        ONE,
    ),
    "datasets-paths": Publisher(
        "messages",
        "huggingface/datasets, Image features that hold a path, bytes, both, or nothing",
        parquet(
            {"images": pa.list_(IMAGE_TYPE), "messages": LIST_OF_MESSAGES},
            {"images": [{"bytes": None, "path": "0.png"}, {"bytes": image_bytes(1), "path": "gone.png"},
                        {"bytes": None, "path": None}, None], "messages": messages("<image><image>Q?", "A.")},
        ),
        [["user: [0][1]Q?", "assistant: A."]],
    ),
    "json-column": Publisher(
        "messages",
        "ThucPD/UIT-ViIC on the Hub: conversations as JSON text, images as bare bytes",
        parquet(
            {"image": pa.binary(), "id": pa.string(), "conversations": pa.string()},
            {"image": image_bytes(0), "id": "1", "conversations": json.dumps(turns("<image>\nQ?", "A."))},
        ),
        ONE,
    ),
    "wrapped": Publisher(
        "llava",
        "huggingface/datasets docs/source/loading.mdx, field='data': the records are in a field of one object",
        document({"version": "0.1.0", "data": [{"image": "0.png", "conversations": turns("<image>Q?", "A.")}], "n": 1}),
        ONE,
    ),
    "roboflow": Publisher(
        "messages",
        "roboflow/maestro docs, datasets/jsonl.md (PaliGemma)",
        lines({"image": "0.png", "prefix": "Q?", "suffix": "A."}),
        ONE,
    ),
    "imagefolder": Publisher(
        "messages",
        "huggingface/datasets docs/source/image_dataset.mdx, ImageFolder with captions",
        lines({"file_name": "0.png", "text": "A."}, name="metadata.jsonl"),
        [["user: [0]Describe.", "assistant: A."]],
        FormatOptions(instruction="Describe."),
    ),
    "img2dataset": Publisher(
        "webdataset",
        "rom1504/img2dataset README.md",
        archive("000000000.jpg", "000000000.json", "000000000.txt", "000000001.JPG", "000000001.TXT",
                **{"000000000_json": b'{"caption": "C", "key": "000000000", "prompt": "P"}'}),
        [["user: [0]", "assistant: 000000000.txt"], ["user: [1]", "assistant: 000000001.TXT"]],
    ),
    "webdataset-images": Publisher(
        "webdataset",
        "webdataset/webdataset#20 (several images), mlfoundations/open_clip#480 (other endings)",
        archive(
            "v1.5/a.10.jpg", "v1.5/a.9.jpg", "v1.5/a.txt", "b.side0.png", "b.top1.png", "b.outputs.txt",
            "c.jpg", "c.seg1.png", "c.cls", "d.left1.png", "d.right0.png", "d.json", "e.json",
            **{"v1_5/a_10_jpg": image_bytes(3), "v1_5/a_9_jpg": image_bytes(2),
                            "d_json": json.dumps({"images": ["d.right0.png", "d.left1.png"],
                                                  "conversations": turns("<image>and<image>", "A.")}).encode(),
                            "e_json": json.dumps(turns("Q?", "A.")).encode()},
        ),
        [
            ["user: [2][3]", "assistant: v1.5/a.txt"],
            ["user: [0][1]", "assistant: b.outputs.txt"],
            ["user: [0]", "assistant: c.cls"],
            ["user: [0]and[1]", "assistant: A."],
            ["user: Q?", "assistant: A."],
        ],
    ),
    "webdataset-dots": Publisher(
        "webdataset",
        "huggingface/datasets#6880, webdataset/webdataset#237: dots in the names",
        archive("s2.0-S0.png", "s2.0-S0.txt", "s2.0-S1.png", "s2.0-S1.txt"),
        [["user: [0]", "assistant: s2.0-S0.txt"], ["user: [1]", "assistant: s2.0-S1.txt"]],
    ),
    "webdataset-on-the-hub": Publisher(
        "messages",
        "Parquet into which the Hub converts WebDataset archives",
        parquet(
            {"__key__": pa.string(), "__url__": pa.string(), "jpg": IMAGE_TYPE, "txt": pa.string()},
            {"__key__": "0001", "__url__": "hf://x.tar", "jpg": embedded(0), "txt": "A."},
        ),
        [["user: [0]", "assistant: A."]],
    ),
}  # fmt: skip


def shown(record: Mapping[str, Any]) -> list[str]:
    """Returns "role: text" for each message of a record as it is stored, with the number of each image."""
    numbers = {image_bytes(i): i for i in range(4)}
    images = iter(record["images"])
    found = []
    for message in json.loads(record["conversation"]):
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        texts = [p["text"] if "text" in p else f"[{numbers[next(images)]}]" for p in parts]
        found.append(f"{message['role']}: {''.join(texts)}")
    return found


@pytest.mark.parametrize("name", PUBLISHERS)
def test_layout(name, tmp_path):
    """Reads the layouts as their publishers show them; `Publisher.source` names the place."""
    publisher = PUBLISHERS[name]
    write_images(tmp_path, 4)
    found = read_all(publisher.format, publisher.write(tmp_path), publisher.options)
    assert [item.why for item in found if isinstance(item, Refused)] == []
    assert [shown(check(item, str(tmp_path), Limits())) for item in found] == publisher.conversations


def test_meta_file_of_internvl(tmp_path):
    """Reads OpenGVLab/InternVL's meta file, with its repeat_time (internvl/train/internvl_chat_finetune.py)."""
    write_images(tmp_path / "playground" / "data", 4)
    for name in ("a", "b"):
        lines(*({"id": f"{name}{i}", "image": f"{i}.png", "conversations": turns("<image>Q?", "A.")} for i in range(4)),
              name=f"{name}.jsonl")(tmp_path)  # fmt: skip
    entry = {"root": "playground/data/", "data_augment": False, "max_dynamic_patch": 12, "length": 4}
    meta = {
        "a": entry | {"annotation": "a.jsonl", "repeat_time": 0.5},
        "b": entry | {"annotation": "b.jsonl", "repeat_time": 2},
    }
    found = read_all("llava", document(meta, "meta.json")(tmp_path))
    assert [item.id for item in found] == ["a0", "a1", *[f"b{i}" for i in range(4)] * 2]
    # Images are found under the meta file's root.
    recipe = Recipe("llava", (str(tmp_path / "meta.json"),))
    assert prepare(recipe, tmp_path / "out", convert=in_processes(1), progress=False).accepted == 10
    meta["b"]["annotation"] = "c.jsonl"
    with pytest.raises(UserError, match="data set 'b': no such file: c.jsonl"):
        read_all("llava", document(meta, "meta.json")(tmp_path))


def test_the_table_in_the_docs_lists_these_layouts():
    table = pathlib.Path("docs/data.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`test_publishers\.py\[([\w-]+)\]`", table))
    assert named == set(PUBLISHERS)
