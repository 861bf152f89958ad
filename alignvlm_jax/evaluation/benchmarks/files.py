"""Readers of benchmark files: rows of JSON, JSON lines and Parquet, and the images they refer to.

A row is a dict. `Row` gives access to its fields; its errors name the file, the record, the missing field and the
available fields. An incomplete row becomes a `Question` with a `problem`, so that it is counted and reported.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from alignvlm_jax.data import shard_names
from alignvlm_jax.data.contents import HEAD_BYTES, describe_other_content
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks.layout import Found
from alignvlm_jax.evaluation.benchmarks.question import Cell, ImageSource, Question


class RowError(UserError):
    """Raised if a row does not have the fields of its format."""


class Row:
    """One record of a file."""

    def __init__(self, fields: Any, where: str):
        if not isinstance(fields, dict):
            raise RowError(f"{where}: expected a record with named fields, got {str(fields)[:80]!r}")
        self.fields, self.where = fields, where

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def get(self, *names: str) -> Any:
        """Returns the value of the first of these fields that is present and not null."""
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        available = ", ".join(name for name in self.fields) or "none"
        raise RowError(f"{self.where}: no field {' or '.join(map(repr, names))} (available fields: {available})")

    def text(self, *names: str) -> str:
        """Returns the first present one of these fields as text. It must be a string or a number."""
        value = self.get(*names)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"{self.where}: expected text in field {names[0]!r}, got {str(value)[:60]!r}")
        return str(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """Returns the first present one of these fields as texts. It must be a list of strings or numbers."""
        value = self.get(*names)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str | int | float) for item in value):
            raise RowError(f"{self.where}: expected a list of texts in field {names[0]!r}, got {str(value)[:60]!r}")
        return tuple(str(item) for item in value)

    def answers(self, *names: str) -> tuple[str, ...] | None:
        """Returns the first present one of these fields as texts, or None if it is absent, empty or blank.

        Publishers withhold the answers of a test split by null, by an empty list or by empty texts.
        """
        present = [name for name in names if name in self]
        answers = self.texts(*present) if present else ()
        return answers if any(answer.strip() for answer in answers) else None


def questions(rows: Iterable[tuple[Any, str]], make: Callable[[Row], Question | None]) -> Iterator[Question]:
    """Converts rows to questions. An unusable row becomes a question with a problem.

    Args:
      rows: pairs of a row's fields and its location. An error takes the place of a record that cannot be parsed.
      make: function that converts one row. It returns None for a row of another benchmark, and raises `UserError` for
        an incomplete one.
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
    """Returns the files that match the first pattern with any match, sorted by name."""
    for pattern in patterns:
        if matches := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return matches
    return []


def find_shards(folder: pathlib.Path, *patterns: str) -> tuple[list[pathlib.Path], tuple[str, ...]]:
    """Returns the files that match the first pattern with any match, and a sentence about each problem of their shards.

    Of two uploads in one folder, only the files of one are returned.
    """
    found = [path.as_posix() for path in find(folder, *patterns)]
    selection = shard_names.select(found)
    return [pathlib.Path(file) for file in selection.files], (*selection.missing, *shard_names.gaps(found))


def split_patterns(*names: str, folders: Sequence[str] = ("data/", "")) -> list[str]:
    """Returns patterns of the Parquet files of a split, which may have any of these names.

    The Hub's own conversion (refs/convert/parquet) has a folder for the split: validation/0000.parquet.
    """
    endings = ("-*.parquet", ".parquet", "/[0-9][0-9][0-9][0-9].parquet")
    return [f"{folder}{name}{ending}" for ending in endings for folder in folders for name in names]


def parquet_questions(
    folder: pathlib.Path,
    split_names: Sequence[str],
    image_columns: Sequence[str],
    make: Callable[[Row], Question | None],
) -> Found | None:
    """Returns the questions in the Parquet files of a split, in the folder or its subfolder data/, or None without any.

    Args:
      folder: folder of a data set, as it is on the Hub.
      split_names: names of the split; the first one with files is read.
      image_columns: columns with images.
      make: function that converts one row, as for `questions`.
    """
    paths, missing = find_shards(folder, *split_patterns(*split_names))
    if not paths:
        return None
    rows = (row for path in paths for row in parquet_rows(path, image_columns))
    return Found(questions(rows, make), missing)


class ImageFolders:
    """The folders in which the images of a file of questions may be.

    Archives of questions and of images unpack side by side, one in the other, or to one folder.
    """

    def __init__(self, file: pathlib.Path, names: Sequence[str], levels: int = 3):
        """Looks for the folders.

        Args:
          file: file of questions.
          names: names of the folders of images, relative to the file's folder or one of the folders above it.
          levels: number of folders above the file's.
        """
        bases = file.absolute().parents[: levels + 1]
        self._first = file.parent / names[0]
        self._folders = [path for base in bases for name in names if (path := base / name).is_dir()]

    def find(self, *names: str) -> pathlib.Path:
        """Returns the path of the first of these files that exists, or else a path where it is expected."""
        paths = (folder / name for name in names for folder in self._folders)
        return next((path for path in paths if path.is_file()), self._first / names[0])


def json_file(file: pathlib.Path) -> Any:
    """Returns the content of a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))  # With or without a byte order mark.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_unreadable(file, "JSON", str(error))) from error


def _unreadable(file: pathlib.Path, kind: str, error: str) -> str:
    """Returns a message about a file that cannot be read, which says what it is instead, if that is known."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if (other := describe_other_content(stream.read(HEAD_BYTES), kind.lower(), advice={})) is not None:
            return f"{file}: cannot be read as {kind}. It is {other}"
    return f"{file}: cannot be read as {kind} ({error}). The file may be incomplete; fetch it again"


def json_lines(file: pathlib.Path) -> Iterator[tuple[Any, str]]:
    """Yields the records of a JSON-lines file and their locations, with an error in place of a damaged record."""
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
    """Yields the records of a list and their locations."""
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of records, got {type(value).__name__}")
    for number, record in enumerate(value, start=1):
        yield record, f"{where}: record {number}"


def parquet_rows(file: pathlib.Path, image_columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the rows of a Parquet file and their locations, with a `Cell` (or a list of them) in place of images."""
    parquet, arrow_error = _parquet()
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            present_columns = tuple(name for name in image_columns if name in names)
            text_columns = [name for name in names if name not in present_columns]
            number = 0
            # Only one row group is in memory at a time, and without its images, which are large.
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=text_columns).to_pylist() if text_columns else []
                counts = _image_counts(table, group, present_columns)
                for row in range(table.metadata.row_group(group).num_rows):
                    number += 1
                    fields = dict(rows[row]) if text_columns else {}
                    for name in present_columns:
                        # A cell holds one image (None), a list of that many images, or nothing (False).
                        cell = Cell(file, group, row, name, present_columns)
                        count = counts[name][row]
                        fields[name] = cell if count is None else None
                        # False is also an int, and means 0 here.
                        if isinstance(count, int):
                            cells = [Cell(file, group, row, name, present_columns, i) for i in range(count)]
                            fields[name] = cells or None
                    yield fields, f"{file}: row {number}"
    except (arrow_error, OSError) as error:
        raise UserError(_unreadable(file, "Parquet", str(error).splitlines()[0])) from error


def check_parquet() -> None:
    """Raises a `UserError` if the package that reads Parquet is missing."""
    _parquet()


def image_bytes(source: ImageSource) -> bytes:
    """Returns the encoded bytes of an image.

    Raises:
      UserError: if the image cannot be read; the message names it.
    """
    if isinstance(source, pathlib.Path):
        try:
            return source.read_bytes()
        except OSError as error:
            raise UserError(f"{source}: the image cannot be read ({error.strerror})") from error
    # Hugging Face's image columns are structs of bytes and path; plain binary columns occur too.
    value = _row_group(source.file, source.row_group, source.columns)[source.column][source.row].as_py()
    if source.index is not None:
        value = value[source.index]
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UserError(
            f"{source}: the cell has no image bytes. The data set may have been saved with paths only; save it with "
            "its images"
        )
    return data


def image_exists(source: ImageSource) -> bool:
    """Returns whether an image seems to be available, without reading it."""
    # The cells of a Parquet file are trusted, because checking them would mean reading them.
    return source.is_file() if isinstance(source, pathlib.Path) else True


@functools.lru_cache(maxsize=1)
def _row_group(file: pathlib.Path, group: int, columns: tuple[str, ...]) -> Any:
    """Returns the images of a row group."""
    # One cached group is enough, because questions are asked in the order of the file.
    parquet, arrow_error = _parquet()
    try:
        with parquet.ParquetFile(file) as table:
            return table.read_row_group(group, columns=list(columns))
    except (arrow_error, OSError) as error:
        raise UserError(f"{file}: row group {group} cannot be read ({str(error).splitlines()[0]})") from error


def _image_counts(table: Any, group: int, columns: Sequence[str]) -> dict[str, list[int | None | bool]]:
    """Returns an entry per column and row: None for one image, the length of a list of images, or False if empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    leaves = [table.schema.column(i).path for i in range(len(table.schema))]
    counts: dict[str, list[int | None | bool]] = {}
    for name in columns:
        # Most files store a path next to the bytes. It is small, and shows as well whether the cell is empty.
        path_leaves = [leaf for leaf in leaves if leaf.startswith(f"{name}.") and leaf.endswith(".path")]
        column = table.read_row_group(group, columns=path_leaves or [name])[name]
        is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        is_valid = pc.is_valid(column).to_pylist()
        lengths = pc.list_value_length(column).to_pylist() if is_list else [None] * len(is_valid)
        counts[name] = [length if valid else False for valid, length in zip(is_valid, lengths, strict=True)]
    return counts


def _parquet() -> tuple[Any, type[Exception]]:
    """Returns pyarrow's Parquet module and its base exception."""
    # pyarrow is an optional dependency.
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install 'alignvlm-jax[data]'") from error
    return pq, pa.ArrowException
