"""Parquet: slices of row groups, and the cost of damage."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.formats.parquet_files import plan_files, read_slice
from alignvlm_jax.data.refusal import Refusal
from tests.data.formats.samples import bigdocs_row, write_parquet


def rows_of(path, columns=("sample_id",), **options):
    slices = plan_files([str(path)], FormatOptions(**options))
    found = [row for piece in slices for row in read_slice(piece, columns)]
    assert sum(piece.records for piece in slices) == len(found)
    assert [number for number, _ in found] == list(range(len(found)))
    return [row for _, row in found]


@pytest.mark.parametrize(
    ("per_group", "per_shard", "records"),
    [(2, 5, [4, 4, 2]), (2, 1, [2] * 5), (3, 6, [6, 4]), (100, 4, [10]), (4, 100, [10])],
)
def test_slices(tmp_path, per_group, per_shard, records):
    path = write_parquet(tmp_path / "a.parquet", [bigdocs_row(i) for i in range(10)], rows_per_group=per_group)
    assert [p.records for p in plan_files([str(path)], FormatOptions(per_shard))] == records
    assert rows_of(path, records_per_shard=per_shard) == [{"sample_id": f"b{i}"} for i in range(10)]


def test_a_file_that_is_not_parquet_is_one_refused_record(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really PAR1")
    (row,) = rows_of(tmp_path / "a.parquet")
    assert isinstance(row, Refusal) and row.kind == "damaged file"
    (tmp_path / "b.parquet").write_bytes(b"")
    assert rows_of(tmp_path / "b.parquet")[0].kind == "damaged file"


def test_more_rows_than_bytes_are_damage(tmp_path):
    """A damaged count must not become a hundred million lines of refused records."""
    pq.write_table(pa.table({"sample_id": ["same"] * 100_000}), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet")
    assert row.kind == "damaged file" and "state 100000 rows" in str(row)


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [bigdocs_row(i) for i in range(12)], rows_per_group=4)
    group = pq.ParquetFile(path).metadata.row_group(1)
    data = bytearray(path.read_bytes())
    for i in range(group.num_columns):
        column = group.column(i)
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(data))
    rows = rows_of(path, ("sample_id", "queries"))
    assert [isinstance(row, Refusal) for row in rows] == [False] * 4 + [True] * 4 + [False] * 4
    assert rows[5].kind == "damaged file" and "row group 1" in str(rows[5])


def test_text_that_is_not_utf8_costs_its_row(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", b"fine"]).cast(pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, column.buffers())
    pq.write_table(pa.table({"sample_id": strings}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert [rows[0], rows[2]] == [{"sample_id": "good"}, {"sample_id": "fine"}]
    assert rows[1].kind == "text encoding"
