"""The file of answers, from which a stopped run resumes.

    {"benchmark": "docvqa", "asked_of": {"checkpoint": "...", "prompt": "{question}", "questions": "9b1f...", ...}}
    {"benchmark": "docvqa", "id": "49153", "answer": "0.28"}
    {"benchmark": "docvqa", "id": "24580", "answer": "University of", "warnings": ["cut_off"]}

The first line of each benchmark records the model, the prompt and the questions that the answers belong to. A run with
other settings is refused. Only lines that end in a newline count: a partial last line, left by a crash, is dropped.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.one_writer import one_writer


class Predictions:
    """File of answers, which this process holds the lease of; a context manager.

    Attributes:
      path: path of the file.
      settings: settings by benchmark, as read from the file or given to `begin`.
      answers: answers by benchmark and question id.
      warnings: kinds of warnings by benchmark and question id, of answers that have some (`inference/answers.py`).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.settings: dict[str, Mapping[str, Any]] = {}
        self.answers: dict[str, dict[str, str]] = {}
        self.warnings: dict[str, dict[str, list[str]]] = {}
        with contextlib.ExitStack() as stack:
            self._lease = stack.enter_context(one_writer(self.path, beside=True))
            try:
                self._file = stack.enter_context(open(self.path, "r+b" if self.path.exists() else "x+b"))
            except OSError as error:
                raise UserError(f"{self.path}: cannot write predictions to this file ({error.strerror})") from error
            self._read()
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
        """Appends answers. They are on disk when this returns."""
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
        try:
            self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}). Run the same command again to resume"
            ) from error

    def _read(self) -> None:
        content = self._file.read()
        # A line that a crash cut off has no newline at its end.
        complete_size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:complete_size].splitlines(), start=1):
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
        # Drop a partial last line, so that new records are appended to the last complete one.
        self._file.seek(complete_size)
        self._file.truncate()
