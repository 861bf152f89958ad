"""A reader that answers by rule, tiny pictures that it can tell apart, and files as benchmarks have them."""

import io
import json
import pathlib
import types
from collections.abc import Callable, Sequence

import PIL.Image

from alignvlm_jax.evaluation.benchmarks import runner
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS


def picture(number: int) -> bytes:
    """A PNG that carries a number from 0 to 255."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


class StubReader:
    """Answers `rule(text, numbers)`: of the message's text, with [number] where its images are.

    Attributes:
      seen: the messages, as such texts, in the order they were asked.
    """

    def __init__(self, rule: Callable[[str], str]):
        self.rule, self.seen, self.generator = rule, [], types.SimpleNamespace(batch_size=4)

    def cut(self, image: PIL.Image.Image) -> int:
        return image.getpixel((0, 0))[0]

    def chat_prompt(self, messages, shown: Sequence[int]) -> str:
        shown, text = list(shown), ""
        for message in messages:
            for part in message["content"]:
                text += f"[{shown.pop(0)}]" if part["type"] == "image" else part["text"]
        assert not shown, "images that no part stands for"
        return text

    def answer(self, prompts, *, max_new_tokens, on_batch) -> list[str]:
        self.seen += prompts
        on_batch(len(prompts))
        return [self.rule(prompt) for prompt in prompts]


def write_image(path: pathlib.Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def write_lines(path: pathlib.Path, records: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def evaluate(name: str, data: pathlib.Path, rule: Callable[[str], str], split: str | None = None, **options):
    """The outcome of a benchmark with a stub that answers by this rule, and the stub."""
    benchmark, stub = BENCHMARKS[name], StubReader(rule)
    split = split or benchmark.split
    questions = runner.read_questions(benchmark, data, split)
    return runner.run(benchmark, split, questions, lambda: stub, None, {"checkpoint": "stub"}, **options), stub


def write_parquet(path: pathlib.Path, rows: Sequence[dict], images: Sequence[str] = ("image",)) -> None:
    """Rows as Hugging Face's `datasets` saves them: an image is {"bytes", "path"}; several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        many = any(isinstance(value, list) for value in values)
        columns[name] = pa.array(values, pa.list_(image) if many else image) if name in images else pa.array(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def cell(number: int) -> dict:
    return {"bytes": picture(number), "path": None}
