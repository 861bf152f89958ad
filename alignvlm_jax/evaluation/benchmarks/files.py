"""The files that benchmarks come in: rows of JSON, JSON lines and Parquet, and the images they speak of.

A row is a dict. Its fields are asked for through `Row`, whose errors name file, record, field and the fields there are;
readers turn a row that lacks something into a `Question` with a `problem`, so that it is counted and listed.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks.question import Cell, Picture, Question


class RowError(UserError):
    """A row has not what its format says it has."""


class Row:
    """One record of a file."""

    def __init__(self, fields: Any, where: str):
        if not isinstance(fields, dict):
            raise RowError(f"{where}: {str(fields)[:80]!r} is no record with named fields")
        self.fields, self.where = fields, where

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def get(self, *names: str) -> Any:
        """The first of these fields that is there."""
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        there = ", ".join(name for name in self.fields) or "none"
        raise RowError(f"{self.where}: it has no field {' or '.join(map(repr, names))} (its fields: {there})")

    def text(self, *names: str) -> str:
        """The first of these fields that is there, which is a text or a number."""
        value = self.get(*names)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"{self.where}: field {names[0]!r} is {str(value)[:60]!r}, not text")
        return str(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """The first of these fields that is there, which is a list of texts or numbers."""
        value = self.get(*names)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str | int | float) for item in value):
            raise RowError(f"{self.where}: field {names[0]!r} is {str(value)[:60]!r}, not a list of texts")
        return tuple(str(item) for item in value)


def questions(rows: Iterable[tuple[Any, str]], make: Callable[[Row], Question | None]) -> Iterator[Question]:
    """What `make` makes of each row and its place; what it cannot use becomes a question with a problem.

    Args:
      rows: fields, or the error in place of a record that cannot be parsed, and where they are.
      make: raises `UserError` for a row that lacks something; None leaves a row out that is none of this benchmark.
    """
    for fields, where in rows:
        try:
            if isinstance(fields, UserError):
                raise fields
            question = make(Row(fields, where))
        except UserError as error:
            question = Question(id=where, where=where, problem=str(error))
        if question is not None:
            yield question


def find(folder: pathlib.Path, *patterns: str) -> list[pathlib.Path]:
    """The files of the first of these patterns that has any, in the order of their names."""
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    return []


def json_file(file: pathlib.Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}): is it complete? fetch it again") from error


def json_lines(file: pathlib.Path) -> Iterator[tuple[Any, str]]:
    """The records of a JSON-lines file, and where they are; in place of one that is damaged, the error."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}: line {number}"
                    try:
                        yield json.loads(line), where
                    except (ValueError, RecursionError) as error:
                        yield RowError(f"{where} is not valid JSON ({error})"), where
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def records(value: Any, where: str) -> Iterator[tuple[Any, str]]:
    """The records of a list, and where they are."""
    if not isinstance(value, list):
        raise UserError(f"{where} holds {type(value).__name__}, not a list of records")
    for number, record in enumerate(value, start=1):
        yield record, f"{where}: record {number}"


def parquet_rows(file: pathlib.Path, image_columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a Parquet file and where they are, with a `Cell` in place of each image (or a list of them)."""
    parquet, arrow_error = _parquet()
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            pictures = tuple(name for name in image_columns if name in names)
            texts = [name for name in names if name not in pictures]
            number = 0
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=texts).to_pylist() if texts else []
                shown = _image_counts(table, group, pictures)
                for row in range(table.metadata.row_group(group).num_rows):
                    number += 1
                    fields = dict(rows[row]) if texts else {}
                    for name in pictures:
                        cell = Cell(file, group, row, name, pictures)
                        count = shown[name][row]
                        fields[name] = cell if count is None else None
                        if isinstance(count, int):
                            fields[name] = [Cell(file, group, row, name, pictures, i) for i in range(count)] or None
                    yield fields, f"{file}: row {number}"
    except (arrow_error, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]}): fetch it again") from error


def image_bytes(picture: Picture) -> bytes:
    """The encoded bytes of an image.

    Raises:
      UserError: it is not there, with its name.
    """
    if isinstance(picture, pathlib.Path):
        try:
            return picture.read_bytes()
        except OSError as error:
            raise UserError(f"{picture}: the image cannot be read ({error.strerror})") from error
    value = _row_group(picture.file, picture.row_group, picture.columns)[picture.column][picture.row].as_py()
    if picture.index is not None:
        value = value[picture.index]
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UserError(f"{picture}: the cell holds no bytes of an image (a data set saved with paths only?)")
    return data


def is_there(picture: Picture) -> bool:
    """Whether an image could be read, as far as can be said without reading it."""
    return picture.is_file() if isinstance(picture, pathlib.Path) else True


@functools.lru_cache(maxsize=1)
def _row_group(file: pathlib.Path, group: int, columns: tuple[str, ...]) -> Any:
    """A group's images. Questions are asked in the order of the file, so one group is kept."""
    parquet, arrow_error = _parquet()
    try:
        with parquet.ParquetFile(file) as table:
            return table.read_row_group(group, columns=list(columns))
    except (arrow_error, OSError) as error:
        raise UserError(f"{file}: row group {group} cannot be read ({str(error).splitlines()[0]})") from error


def _image_counts(table: Any, group: int, columns: Sequence[str]) -> dict[str, list[int | None | bool]]:
    """For each row of a group: None for one image, how many there are in a list, False for an empty cell."""
    import pyarrow as pa
    import pyarrow.compute as pc

    leaves = [table.schema.column(i).path for i in range(len(table.schema))]
    counts: dict[str, list[int | None | bool]] = {}
    for name in columns:
        # Beside the bytes there mostly is a path, which tells as well whether the cell is empty, and is small.
        small = [leaf for leaf in leaves if leaf.startswith(f"{name}.") and leaf.endswith(".path")]
        column = table.read_row_group(group, columns=small or [name])[name]
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        there = pc.is_valid(column).to_pylist()
        lengths = pc.list_value_length(column).to_pylist() if is_list else [None] * len(there)
        counts[name] = [length if valid else False for valid, length in zip(there, lengths, strict=True)]
    return counts


def _parquet() -> tuple[Any, type[Exception]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install 'alignvlm-jax[data]'") from error
    return pq, pa.ArrowException
