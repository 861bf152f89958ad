"""A reader that answers by a rule, tiny images that it can tell apart, and writers of benchmark files."""

import io
import json
import pathlib
import types
from collections.abc import Callable, Sequence

import PIL.Image

from alignvlm_jax.evaluation.benchmarks import runner
from alignvlm_jax.evaluation.benchmarks.reading import read_questions
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS
from alignvlm_jax.inference.reader import TrainingRecord


def png(number: int) -> bytes:
    """Returns a PNG that encodes a number from 0 to 255."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


class StubReader:
    """Reader that answers `rule(text)`, where `text` is the message with [number] in place of its images.

    Attributes:
      seen: texts of all messages, in the order in which they were asked.
    """

    def __init__(self, rule: Callable[[str], str]):
        self.rule, self.seen, self.generator = rule, [], types.SimpleNamespace(batch_size=4)
        self.training = TrainingRecord()

    def cut(self, image: PIL.Image.Image) -> int:
        """Returns the number that an image encodes."""
        return image.getpixel((0, 0))[0]

    def chat_prompt(self, messages, images: Sequence[int]) -> str:
        """Returns the text of the messages, with [number] for each image."""
        images, text = list(images), ""
        for message in messages:
            for part in message["content"]:
                text += f"[{images.pop(0)}]" if part["type"] == "image" else part["text"]
        assert not images, "images without a part of a message"
        return text

    def answer(self, prompts, *, max_new_tokens, on_batch) -> list[str]:
        """Answers prompts by the rule."""
        self.seen += prompts
        on_batch(len(prompts))
        return [self.rule(prompt) for prompt in prompts]


def write_image(path: pathlib.Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))


def write_lines(path: pathlib.Path, records: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def evaluate(
    name: str,
    data: pathlib.Path,
    rule: Callable[[str], str],
    split: str | None = None,
    allow_partial: bool = False,
    **options,
):
    """Returns the outcome of a benchmark with a stub that answers by this rule, and the stub."""
    benchmark, stub = BENCHMARKS[name], StubReader(rule)
    split = split or benchmark.split
    questions = read_questions(benchmark, data, split, allow_partial=allow_partial)
    return runner.run(benchmark, split, questions, lambda: stub, None, {"checkpoint": "stub"}, **options), stub


def write_parquet(path: pathlib.Path, rows: Sequence[dict], images: Sequence[str] = ("image",)) -> None:
    """Writes rows as Hugging Face's `datasets` does: images as {"bytes", "path"}, and several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        is_list = any(isinstance(value, list) for value in values)
        columns[name] = pa.array(values, pa.list_(image) if is_list else image) if name in images else pa.array(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def cell(number: int) -> dict:
    return {"bytes": png(number), "path": None}
