"""Small data sets of every format, as users have them."""

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.conversation import Conversation, FormatOptions, Refused

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@functools.cache
def image_bytes(number: int = 0, *, format: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    """Returns an image file that differs for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    encoded = io.BytesIO()
    PIL.Image.fromarray(pixels).save(encoded, format)
    return encoded.getvalue()


def write_images(folder: Path, number: int) -> Path:
    """Writes 0.png, 1.png, ... to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(image_bytes(i))
    return folder


def llava_record(number: int, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\nQuestion {number}?"}, {"from": "gpt", "value": f"Answer {number} ✓"}]
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": turns} | fields


def docdownstream_record(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "image": [f"./{number}.png"],
        "messages": [
            {"role": "user", "content": f"<|image|>Question {number}?"},
            {"role": "assistant", "content": f"Answer {number}"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "DocVQA",
    } | fields


def embedded(number: int) -> dict[str, Any]:
    """Returns an image as Parquet files on the Hub store it."""
    return {"bytes": image_bytes(number), "path": None}


def bigdocs_row(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "sample_id": f"b{number}",
        "image": embedded(number),
        "queries": [f"Question {number}?", "And then?"],
        "annotations": [f"Answer {number}", "Nothing."],
    } | fields


def messages_row(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "images": [embedded(number)],
        "messages": [
            {"role": "user", "content": f"<image>Question {number}?"},
            {"role": "assistant", "content": f"Answer {number}"},
        ],
    } | fields


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], *, rows_per_group: int = 4) -> Path:
    table = pa.Table.from_pylist(rows)
    for name in ("image", "images"):
        if name in table.column_names:
            kind = IMAGE_TYPE if name == "image" else pa.list_(IMAGE_TYPE)
            column = pa.array([row.get(name) for row in rows], kind)
            table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, numbers: range, *, mode: str = "w") -> Path:
    """Writes an archive of captioned images in the layout of img2dataset."""
    with tarfile.open(path, mode) as archive:
        for i in numbers:
            add_file(archive, f"{i:09d}.jpg", image_bytes(i, format="JPEG"))
            add_file(archive, f"{i:09d}.json", json.dumps({"caption": "not this", "key": i}).encode())
            add_file(archive, f"{i:09d}.txt", f"Caption {i}\n".encode())
    return path


def read_all(name: str, path: Path, options: FormatOptions = FormatOptions()) -> list[Conversation | Refused]:  # noqa: B008
    """Returns all conversations and refusals of a file."""
    return [found for piece in FORMATS[name].plan([str(path)], options) for found in FORMATS[name].read(piece, options)]


def write_input(name: str, folder: Path, number: int) -> Path:
    """Writes an input file of `number` good records in any format, and their images to folder/images."""
    write_images(folder / "images", number)
    numbers = range(number)
    if name == "llava":
        return write_json(folder / "data.json", [llava_record(i) for i in numbers])
    if name == "docdownstream":
        return write_lines(folder / "data.jsonl", [docdownstream_record(i) for i in numbers])
    if name == "bigdocs":
        return write_parquet(folder / "data.parquet", [bigdocs_row(i) for i in numbers])
    if name == "messages":
        return write_parquet(folder / "data.parquet", [messages_row(i) for i in numbers])
    return write_tar(folder / "data.tar", numbers)
