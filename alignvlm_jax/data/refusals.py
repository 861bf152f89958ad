"""`data_refused.jsonl`: the examples that training could not use, each listed once."""

import json
from collections.abc import Iterable
from pathlib import Path

from alignvlm_jax.data.packing import Refused
from alignvlm_jax.data.shortening import shorten
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage.text_files import append_text, read_text_if_exists

_MAX_REASON = 480


class RefusalLog:
    """Appends refused examples to a file, over all epochs and restarts of a run.

    Each line has the form {"id": ..., "source": ..., "reason": ...}. The file is created at the first refusal.
    """

    def __init__(self, path: Path):
        self._path = path
        lines = read_text_if_exists(path).splitlines()
        self._logged = {(entry["source"], entry["id"]) for entry in map(_parse, lines) if entry}

    def add(self, refused: Iterable[Refused]) -> None:
        """Appends the examples that are not in the file yet. An example refused in every epoch is listed once."""
        new = {(example.source, example.id): example for example in refused}
        new = {name: example for name, example in new.items() if name not in self._logged}
        if not new:
            return
        entries = ({"id": e.id, "source": e.source, "reason": shorten(e.reason, _MAX_REASON)} for e in new.values())
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        try:
            append_text(self._path, "".join(lines))
        except (OSError, UserError):
            # A full disk must not end a run. The examples are added when they are refused again.
            return
        self._logged |= new.keys()


def _parse(line: str) -> dict[str, str] | None:
    try:
        return json.loads(line)
    except ValueError:  # a line truncated when a run was killed
        return None
