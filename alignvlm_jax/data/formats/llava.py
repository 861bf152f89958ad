r"""LLaVA's JSON: a list of records with turns, or one record per line; and the mixtures of such files.

    {"id": "17", "image": "coco/000.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}

`image` may be a list (also under the name `images`). It is missing, null or empty if a conversation has no images.
`layouts.py` reads the records, and also those of other publishers. A mixture is a YAML file of LLaVA-NeXT
(`mixture.py`) or a meta file of InternVL (`internvl.py`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data.formats import internvl, json_files, layouts, mixture
from alignvlm_jax.data.formats.conversation import Conversation, FormatOptions, Refused, Slice

_MIXTURES = (".yaml", ".yml")
SUFFIXES = (".json", ".jsonl", *_MIXTURES)


def referenced_files(files: Sequence[str]) -> list[str]:
    """Returns the files that mixtures name."""
    found = []
    for file in files:
        if file.endswith(_MIXTURES):
            found += [part.file for part in mixture.read_mixture(file)]
        elif (meta := internvl.read_meta(file)) is not None:
            found += [part.file for part in meta]
    return found


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of JSON files, including files that mixtures name."""
    slices = []
    for file in files:
        if file.endswith(_MIXTURES):
            for part in mixture.read_mixture(file):
                picks = part.sampling.choose(json_files.count_records(part.file)) if part.sampling else None
                slices += json_files.plan_file(part.file, options, picks)
        elif (meta := internvl.read_meta(file)) is not None:
            for part in meta:
                slices += internvl.plan_entry(part, options)
        else:
            slices += json_files.plan_file(file, options)
    return slices


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice."""
    stem = Path(piece.file).stem

    def convert(record: dict[str, Any], where: str, number: int) -> Conversation:
        return layouts.to_conversation(
            record, where, default_id=f"{stem}:{number}", default_source=stem, options=options
        )

    return json_files.read_conversations(piece, options, convert)
