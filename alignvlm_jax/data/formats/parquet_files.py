"""Reads Parquet files by row groups; damage costs only the affected row or the rest of its row group."""

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alignvlm_jax.data.contents import HEAD_BYTES, describe_other_content
from alignvlm_jax.data.formats.conversation import FormatOptions, Slice
from alignvlm_jax.data.paths import open_binary
from alignvlm_jax.data.refusal import Refusal

# Rows hold images, so only a few are read at a time.
_ROWS_AT_A_TIME = 16
_BYTES_PER_SLICE = 512 * 2**20


def is_parquet(file: str) -> bool:
    """Returns whether a file is Parquet, by its name or by its first bytes."""
    if file.lower().endswith(".parquet"):
        return True
    with open_binary(file) as stream:
        return stream.read(4) == b"PAR1"


def plan_files(files: Sequence[str], options: FormatOptions) -> list[Slice]:
    """Returns slices of complete row groups. An unreadable file becomes one slice with one record to be refused."""
    return [piece for file in files for piece in _plan_file(file, options)]


def read_slice(piece: Slice, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | Refusal]]:
    """Yields the rows of a slice with their numbers: parsed, or the `Refusal` of a row that cannot be read.

    Args:
      piece: the slice.
      columns: names or patterns of the columns to read; a file may lack some of them.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_parquet(piece.file))
        except Refusal as refusal:
            yield piece.first, refusal
            return
        names = file.schema_arrow.names
        present = [name for name in names if any(fnmatch.fnmatchcase(name, column) for column in columns)]
        number = piece.first
        for group in range(piece.start, piece.stop):
            stop = number + file.metadata.row_group(group).num_rows
            problem = "it has fewer rows than its metadata state"
            try:
                for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], present):
                    for i in range(batch.num_rows):
                        yield number, _row(batch, i)
                        number += 1
            except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
                problem = _first_line(error)
            # Account for every row: refuse the rest of a damaged group row by row.
            for missing in range(number, stop):
                yield missing, Refusal("damaged file", f"row group {group} cannot be read ({problem})")
            number = stop


def _plan_file(path: str, options: FormatOptions) -> Iterator[Slice]:
    """Yields the slices of a file."""
    try:
        with _parquet(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except Refusal:
        yield Slice(path, records=1)  # `read_slice` refuses it and states the reason
        return
    # Collect row groups until a slice has enough rows or bytes.
    start, first, rows, size = 0, 0, 0, 0
    for group, (group_rows, group_size) in enumerate(sizes):
        if rows and (rows + group_rows > options.records_per_shard or size + group_size > _BYTES_PER_SLICE):
            yield Slice(path, start, group, first, rows)
            start, first, rows, size = group, first + rows, 0, 0
        rows, size = rows + group_rows, size + group_size
    if rows:
        yield Slice(path, start, len(sizes), first, rows)


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file; raises a `Refusal` if its metadata are damaged."""
    with open_binary(path) as handle:
        if content := describe_other_content(handle.read(HEAD_BYTES), "parquet"):
            raise Refusal("damaged file", f"the file is {content}")
        size = handle.seek(0, 2)
        handle.seek(0)
        try:
            file = pq.ParquetFile(handle)
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            file.schema_arrow  # noqa: B018  # raises an error if the schema is impossible
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            raise Refusal("damaged file", f"the file cannot be read as Parquet ({_first_line(error)})") from error
        # A row with an image takes more than a byte, so larger numbers come from damaged metadata.
        if min(rows, default=0) < 0 or sum(rows) > size:
            raise Refusal("damaged file", f"the metadata state {sum(rows)} rows in a file of {size} bytes")
        yield file


def _row(batch: pa.RecordBatch, i: int) -> dict[str, Any] | Refusal:
    """Returns a row, or the reason why it cannot be read."""
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Refusal("text encoding", f"a column is not UTF-8 ({error.reason})")
    except (pa.ArrowException, ValueError) as error:
        return Refusal("unreadable record", f"the row cannot be read ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    """Returns the beginning of an error message."""
    return str(error).split("\n")[0][:200]
