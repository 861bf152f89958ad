"""Shows the wrong answers of an evaluation, with their images as files."""

import io
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from alignvlm_jax.evaluation.answer_metrics import METRICS
from alignvlm_jax.evaluation.report import Answer, Report
from alignvlm_jax.locations import is_local
from alignvlm_jax.output_files import is_stream


def show(
    report: Report,
    records: Sequence[Mapping[str, Any]],
    metric_name: str,
    limit: int,
    predictions_file: str | pathlib.Path | None,
) -> str:
    """Saves the images of the first wrong answers, and returns a text that shows the answers.

    Args:
      report: the evaluation.
      records: records of its split.
      metric_name: name of the metric by which an answer without the full score is wrong.
      limit: maximum number of answers.
      predictions_file: file next to which the images are saved; None saves them in a temporary folder.
    """
    metric = METRICS[metric_name]
    wrong = [answer for answer in report.answers if metric.score_of(answer) < 1]
    if not wrong:
        return f"no wrong answers by {metric.title}"
    folder = _image_folder(predictions_file)
    lines = [f"wrong answers by {metric.title}, {min(limit, len(wrong))} of {len(wrong)}:"]
    saved: dict[int, list[pathlib.Path]] = {}
    for answer in wrong[:limit]:
        if answer.record not in saved:
            saved[answer.record] = _save_images(records[answer.record], folder / str(answer.record))
        lines += ["", *_describe(answer, saved[answer.record])]
    return "\n".join(lines)


def _describe(answer: Answer, images: Sequence[pathlib.Path]) -> list[str]:
    """Returns the lines of one answer. Texts of several lines are shown as one."""
    fields = {
        "image": ", ".join(map(str, images)) or "none",
        "question": answer.question,
        "answer": answer.predicted,
        "expected": answer.expected,
    }
    return [answer.document, *(f"  {name:<9} {' '.join(text.split())}" for name, text in fields.items())]


def _image_folder(predictions_file: str | pathlib.Path | None) -> pathlib.Path:
    """Returns a folder for the images."""
    if predictions_file and is_local(predictions_file) and not is_stream(predictions_file):
        return pathlib.Path(predictions_file).with_suffix(".wrong")
    return pathlib.Path(tempfile.mkdtemp(prefix="alignvlm-wrong-"))


def _save_images(record: Mapping[str, Any], stem: pathlib.Path) -> list[pathlib.Path]:
    """Writes the images of a record as they are stored, and returns their files: STEM-1.png, STEM-2.jpeg, ..."""
    files = []
    for number, data in enumerate(record["images"] if "images" in record else [record["image"]], start=1):
        file = stem.with_name(f"{stem.name}-{number}.{_extension(data)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        files.append(file)
    return files


def _extension(data: bytes) -> str:
    """Returns the extension of an image file."""
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.format.lower()
    except OSError:  # a kind that only `data/images.py` reads
        return "image"
