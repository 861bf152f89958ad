"""Small records with small images, and readers of them."""

import io
import json

import numpy as np
import PIL.Image

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.examples import ExampleReader, Part, number_parts
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.tiling import TilingConfig

TILING = TilingConfig(tile_size=32, max_tiles=4, thumbnail=False)
PACKING = PackingConfig(tokens_per_bin=160, tiles_per_bin=8, bins_per_microbatch=4, examples_per_bin=8, window=6)
TOKEN_GRID = (2, 2)
PER_TILE = 4


def png_image(value: int, size: tuple[int, int]) -> bytes:
    """Returns a PNG of a single gray."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((size[1], size[0], 3), value % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def page(i: int, rng: np.random.Generator, size: tuple[int, int] | None = None) -> dict:
    """Returns a record like the demo's documents."""
    turns = int(rng.integers(1, 4))
    return {
        "image": png_image(i, size or tuple(rng.integers(20, 64, 2).tolist())),
        "id": f"page-{i}",
        "source": "receipt",
        "font": "any",
        "transcription": f"Invoice {i}\nthe total {i}.50",
        "questions": [f"What is {i}-{turn}?" for turn in range(turns)],
        "answers": [f"{i}.{turn}" for turn in range(turns)],
    }


def pages(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [page(i, rng) for i in range(count)]


def turn(question: str, answer: str, images: int = 0) -> list[dict]:
    """Returns a question about `images` images and its answer, as messages."""
    parts = [{"type": "image"}] * images + ([{"type": "text", "text": question}] if question else [])
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def prepared(i: int, *turns: list[dict], sizes: tuple[tuple[int, int], ...] = ()) -> dict:
    """Returns a record as `alignvlm prepare` writes it, with one image of each size."""
    return {
        "id": f"record-{i}",
        "source": "mixture",
        "images": [png_image(10 * i + j, size) for j, size in enumerate(sizes)],
        "conversation": json.dumps([message for messages in turns for message in messages]),
    }


def mixed_records(count: int, seed: int = 0) -> list[dict]:
    """Returns records with several images, with several turns, with text only and with an image only, in turn."""
    rng = np.random.default_rng(seed)

    def size():
        return tuple(rng.integers(20, 64, 2).tolist())

    records = []
    for i in range(count):
        kinds = [
            lambda i: prepared(i, turn(f"Total {i}?", f"{i}.5", 2), turn("Date?", f"day {i}"), sizes=(size(), size())),
            lambda i: prepared(i, turn("Name?", f"Anna {i}", 1), turn("And here?", "Eve", 1), sizes=(size(), size())),
            lambda i: prepared(i, turn(f"What is {i} + 1?", f"{i + 1}")),
            lambda i: prepared(i, turn("", f"a photograph of {i}", 1), sizes=(size(),)),
        ]
        records.append(kinds[i % len(kinds)](i))
    return records


def reader(parts, chat: ChatTokenizer, **changes) -> ExampleReader:
    """Returns a reader of the parts, or of records with the task "qa"."""
    if not isinstance(parts[0], Part):
        parts = [Part("documents/train", parts, "qa")]
    options = dict(tiling=TILING, packing=PACKING, token_grid=TOKEN_GRID, seed=3, max_text_tokens=120)
    return ExampleReader(number_parts(parts), chat, **{**options, **changes})
