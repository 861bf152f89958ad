r"""Conversations in Parquet or JSON, in the layouts common on the Hugging Face Hub and in fine-tuning tools.

    images [{bytes, path}] | messages      [{role: "user", content: "<image>What is this?"}, {role: "assistant", ...}]
    image {bytes, path}    | conversations [{from: "human", value: "<image>\nWhat is this?"}, {from: "gpt", ...}]
    images [{bytes, path}] | texts         [{user: "What is this?", assistant: "A bus.", source: "vqav2"}]

`layouts.py` reads the records. JSON files are read as in `llava.py`, which differs only in the files that it takes from
a folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from alignvlm_jax.data.formats import layouts, llava, parquet_files
from alignvlm_jax.data.formats.conversation import Conversation, FormatOptions, Refused, Slice
from alignvlm_jax.data.refusal import Refusal

SUFFIXES = (".parquet", ".json", ".jsonl")


def referenced_files(files: Sequence[str]) -> list[str]:
    """Returns the files that mixtures name."""
    return llava.referenced_files([file for file in files if not parquet_files.is_parquet(file)])


def plan(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of row groups, or of JSON files."""
    slices = []
    for file in files:
        slices += (parquet_files.plan_files if parquet_files.is_parquet(file) else llava.plan)([file], options)
    return slices


def read(piece: Slice, options: FormatOptions) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice."""
    if not parquet_files.is_parquet(piece.file):
        yield from llava.read(piece, options)
        return
    stem = Path(piece.file).stem
    for number, row in parquet_files.read_slice(piece, layouts.COLUMNS):
        where, record_id = f"{piece.file}: row {number + 1}", f"{stem}:{number}"
        try:
            if isinstance(row, Refusal):
                raise row
            record_id = layouts.record_id(row, record_id)
            yield layouts.to_conversation(row, where, default_id=record_id, default_source=stem, options=options)
        except Refusal as refusal:
            yield Refused(where, record_id, refusal.kind, str(refusal))
