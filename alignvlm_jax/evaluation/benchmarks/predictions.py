"""The file of answers, from which a stopped run resumes.

    {"benchmark": "docvqa", "asked_of": {"checkpoint": "...", "prompt": "{question}", "questions": "9b1f...", ...}}
    {"benchmark": "docvqa", "id": "49153", "answer": "0.28"}
    {"benchmark": "docvqa", "id": "24580", "answer": "University of", "warnings": ["cut_off"]}

The first line of each benchmark records the model, the prompt and the questions that the answers belong to. A run with
other settings is refused. Only lines that end in a newline count: a partial last line, left by a crash, is dropped.

A file in a bucket cannot be appended to. It is written again, as a whole, with each group of answers.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.locations import is_local, open_location
from alignvlm_jax.output_files import check_writable, write_atomically
from alignvlm_jax.storage.errors import translated_errors


class Predictions:
    """File of answers, which this process holds the lease of; a context manager.

    Attributes:
      path: path of the file.
      settings: settings by benchmark, as read from the file or given to `begin`.
      answers: answers by benchmark and question id.
      warnings: kinds of warnings by benchmark and question id, of answers that have some (`inference/answers.py`).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = open_location(path)
        self.settings: dict[str, Mapping[str, Any]] = {}
        self.answers: dict[str, dict[str, str]] = {}
        self.warnings: dict[str, dict[str, list[str]]] = {}
        with contextlib.ExitStack() as stack:
            self._lease = stack.enter_context(one_writer(self.path, beside=True))
            self._file: _File = stack.enter_context(_LocalFile(self.path) if is_local(path) else _Object(self.path))
            self._parse(self._file.content)
            # Everything worked, so the file and the lease are kept until the end of the context.
            self._stack = stack.pop_all()

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def begin(self, benchmark: str, settings: Mapping[str, Any]) -> dict[str, str]:
        """Starts a benchmark, and returns its stored answers by question id.

        Args:
          benchmark: name of the benchmark.
          settings: model, prompt and questions of this run.

        Raises:
          UserError: if the stored answers come from another model or prompt, or belong to other questions.
        """
        settings = json.loads(json.dumps(settings))  # Tuples become lists, to compare equal with what was read.
        stored = self.settings.get(benchmark)
        if stored is None:
            self._append([{"benchmark": benchmark, "asked_of": settings}])
            self.settings[benchmark] = settings
        elif stored != settings:
            changed = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
            changes = "; ".join(f"{key} was {stored.get(key)!r} and is {settings.get(key)!r}" for key in changed)
            raise UserError(
                f"{self.path}: the answers to {benchmark} come from a run with other settings: {changes}. Name another "
                "--predictions file, or remove this one"
            )
        return self.answers.setdefault(benchmark, {})

    def add(self, benchmark: str, answers: Mapping[str, str]) -> None:
        """Appends answers. They are on the disk, or in the bucket, when this returns."""
        records = []
        for id, answer in answers.items():
            warnings = list(getattr(answer, "warnings", ()))
            records.append({"benchmark": benchmark, "id": id, "answer": answer})
            if warnings:
                records[-1]["warnings"] = warnings
                self.warnings.setdefault(benchmark, {})[id] = warnings
        self._append(records)
        self.answers.setdefault(benchmark, {}).update(answers)

    def _append(self, records: list[dict[str, Any]]) -> None:
        self._lease.check()
        self._file.append("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())

    def _parse(self, content: bytes) -> None:
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                record = json.loads(line)
                name = record["benchmark"]
                if "asked_of" in record:
                    self.settings[name] = record["asked_of"]
                else:
                    self.answers.setdefault(name, {})[str(record["id"])] = str(record["answer"])
                    if record.get("warnings"):
                        self.warnings.setdefault(name, {})[str(record["id"])] = list(record["warnings"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}: line {number} was not written by `alignvlm eval --benchmark` ({error}). Name "
                    "another --predictions file, or remove this one"
                ) from error


class _File(Protocol):
    """A file that grows.

    Attributes:
      content: the complete lines that it had when it was opened.
    """

    content: bytes

    def append(self, lines: bytes) -> None:
        """Adds complete lines."""


class _LocalFile:
    """A file on a disk."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._stream = open(path, "r+b" if path.exists() else "x+b")
        except OSError as error:
            raise UserError(f"{path}: cannot write predictions to this file ({error.strerror})") from error
        self.content = _complete_lines(self._stream.read())
        self._stream.seek(len(self.content))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()

    def append(self, lines: bytes) -> None:
        """Adds lines, and waits until they are on the disk."""
        try:
            self._stream.truncate()  # drops a partial last line, once
            self._stream.write(lines)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}). Run the same command again to resume"
            ) from error


class _Object(contextlib.nullcontext):
    """A file in a bucket."""

    def __init__(self, path: Path):
        super().__init__(self)
        self._path, self.content = path, b""
        check_writable(path)
        with contextlib.suppress(FileNotFoundError), translated_errors(str(path)):
            self.content = _complete_lines(path.read_bytes())

    def append(self, lines: bytes) -> None:
        """Replaces the object by one with further lines."""
        write_atomically(self._path, self.content + lines)
        self.content += lines


def _complete_lines(content: bytes) -> bytes:
    # A line that a crash cut off has no newline at its end.
    return content[: content.rfind(b"\n") + 1]
