"""Two thousand damaged files, from a fixed seed, go through the complete conversion: no crash and no lost record."""

import io
import json
import os
import random
from pathlib import Path

import PIL.Image
import pytest

from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.checks import Limits
from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.formats.mixture import read_mixture
from alignvlm_jax.data.images import open_image
from alignvlm_jax.data.prepare import Recipe, Summary, in_processes, prepare
from alignvlm_jax.data.store import open_dataset
from alignvlm_jax.errors import UserError
from tests.data.formats.samples import image_bytes, llava_record, write_images, write_input, write_json

FILES_PER_FORMAT = 260
IMAGES = 600
MIXTURES = 150
RECORDS_PER_FILE = 5
TOKENS = [
    *(b"\0", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\xff", b"\xe2\x82", b"\x7f\xff\xff\xff"),
    *(b"\\ud800", b"\\u0000", b"null", b"1e999", b"-1", b"NaN", b"<image>", b"<|image|>", b"../" * 8, b"/etc/passwd"),
    *(b" " * 64, b"[" * 3000),
]


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def mutate(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """Returns the data with a few random changes, such as disks, networks and people cause."""
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 7, 64, 700))
        change = rng.randrange(7)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at : at + length] = rng.randbytes(length)
        elif change == 2:
            del data[at : at + length]
        elif change == 3:
            data[at:at] = rng.choice(TOKENS)
        elif change == 4:
            data[at : at + length] = bytes(length)
        elif change == 5:
            data[at:at] = data[at : at + length]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def assert_good(out: Path, summary: Summary) -> None:
    """Checks that every record of the data set can be used for training, and every other one is listed."""
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == summary.num_rejected
    assert all(reject["where"] and reject["kind"] and reject["why"] for reject in rejects)
    source = open_dataset(out, "train")
    assert len(source) == summary.accepted
    for i in range(len(source)):
        messages = json.loads(source[i]["conversation"])
        turns = [message["role"] for message in messages if message["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        marks = sum(part["type"] == "image" for m in messages if m["role"] == "user" for part in m["content"])
        assert marks == len(source[i]["images"])
        for image in source[i]["images"]:
            open_image(image)
        assert not any("\0" in part.get("text", "") for m in messages if m["role"] == "user" for part in m["content"])


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_of_every_format(name, tmp_path):
    rng = random.Random(f"files {name}")
    whole = write_input(name, tmp_path, RECORDS_PER_FILE)
    content = whole.read_bytes()
    (tmp_path / "damaged").mkdir()
    for i in range(FILES_PER_FORMAT):
        (tmp_path / "damaged" / f"{i:03d}{whole.suffix}").write_bytes(mutate(content, rng))
    recipe = Recipe(
        name,
        (str(tmp_path / "damaged"),),
        options=FormatOptions(),
        limits=Limits(str(tmp_path / "images"), max_pixels=10**6),
    )
    summary = prepare(recipe, tmp_path / "out", max_rejects=1, convert=in_processes(1), progress=False)
    assert_good(tmp_path / "out", summary)
    # The damage is real, but much of a damaged file can still be used.
    assert summary.num_rejected > FILES_PER_FORMAT / 3
    assert summary.accepted > FILES_PER_FORMAT * RECORDS_PER_FILE / 6


def test_damaged_images(tmp_path):
    rng = random.Random("images")
    folder = write_images(tmp_path / "images", 0)
    encoded_images = [
        image_bytes(i, format=kind) for i, kind in enumerate(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"))
    ]
    animated = io.BytesIO()
    frames = [PIL.Image.new("P", (9, 9), i) for i in range(3)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    encoded_images.append(animated.getvalue())
    records = []
    for i in range(IMAGES):
        (folder / f"{i}.png").write_bytes(mutate(encoded_images[i % len(encoded_images)], rng))
        records.append(llava_record(i))
    file = write_json(tmp_path / "data.json", records)
    recipe = Recipe("llava", (str(file),), limits=Limits(str(folder), max_pixels=10**6))
    summary = prepare(recipe, tmp_path / "out", max_rejects=1, convert=in_processes(1), progress=False)
    assert summary.total == IMAGES
    assert set(summary.rejected) == {"unreadable image"}
    assert IMAGES / 4 < summary.num_rejected < IMAGES
    assert_good(tmp_path / "out", summary)


def test_damaged_mixtures(tmp_path):
    rng = random.Random("mixtures")
    write_json(tmp_path / "a.json", [])
    content = b"datasets:\n  - json_path: a.json\n    sampling_strategy: first:10%\n  - {json_path: a.json}\n"
    outcomes = {"read": 0, "refused": 0}
    for i in range(MIXTURES):
        path = tmp_path / f"{i}.yaml"
        path.write_bytes(mutate(content, rng, most=1))
        try:
            read_mixture(str(path))
            outcomes["read"] += 1
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > MIXTURES / 20


def test_number_of_damaged_files():
    assert FILES_PER_FORMAT * len(FORMATS) + IMAGES + MIXTURES >= 2000
