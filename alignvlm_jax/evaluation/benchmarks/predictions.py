"""Answers on disk, so that a run that was stopped goes on where it was.

    {"benchmark": "docvqa", "asked_of": {"checkpoint": "...", "prompt": "{question}", "questions": "9b1f...", ...}}
    {"benchmark": "docvqa", "id": "49153", "answer": "0.28"}
    {"benchmark": "docvqa", "id": "24580", "answer": "University of California"}

The first line of each benchmark says of what model, with what prompt and which questions the answers are; a run whose
own differ is refused. A line counts once its newline is there: what a crash left behind the last one is dropped.
"""

import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.errors import UserError


class Predictions:
    """The file, open for this process alone; a context manager."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.asked_of: dict[str, Mapping[str, Any]] = {}
        self.answers: dict[str, dict[str, str]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "r+b" if self.path.exists() else "x+b")
        except OSError as error:
            raise UserError(f"{self.path}: predictions cannot be written there ({error.strerror})") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def begin(self, benchmark: str, asked_of: Mapping[str, Any]) -> dict[str, str]:
        """Says whose answers follow; the answers that are there already, by the question's id.

        Raises:
          UserError: those were given by another model, to another prompt, or to other questions.
        """
        asked_of = json.loads(json.dumps(asked_of))  # As it will be read again.
        before = self.asked_of.get(benchmark)
        if before is None:
            self._append([{"benchmark": benchmark, "asked_of": asked_of}])
            self.asked_of[benchmark] = asked_of
        elif before != asked_of:
            changed = [key for key in {**before, **asked_of} if before.get(key) != asked_of.get(key)]
            was = "; ".join(f"{key} was {before.get(key)!r} and is {asked_of.get(key)!r}" for key in changed)
            raise UserError(
                f"{self.path} has answers to {benchmark} that were asked for otherwise: {was}. Name another "
                "--predictions file, or remove this one"
            )
        return self.answers.setdefault(benchmark, {})

    def add(self, benchmark: str, answers: Mapping[str, str]) -> None:
        """Appends answers; once this returns they are on the disk."""
        self._append([{"benchmark": benchmark, "id": id, "answer": answer} for id, answer in answers.items()])
        self.answers.setdefault(benchmark, {}).update(answers)

    def _append(self, records: list[dict[str, Any]]) -> None:
        try:
            self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); the same command goes on from here"
            ) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"{self.path}: another run is writing to it") from error
            # A file system without locks: two runs at once are then the user's to avoid.

    def _read(self) -> None:
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                name = record["benchmark"]
                if "asked_of" in record:
                    self.asked_of[name] = record["asked_of"]
                else:
                    self.answers.setdefault(name, {})[str(record["id"])] = str(record["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}: line {number} is none that `alignvlm eval --benchmark` wrote ({error}): name "
                    "another --predictions file, or remove this one"
                ) from error
        self._file.seek(whole)
        self._file.truncate()
