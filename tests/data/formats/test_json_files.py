"""Records in JSON files are found by their brackets, even if the text between them is damaged."""

import json
import time

import pytest

from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.formats.json_files import count_records, plan_file, read_slice
from alignvlm_jax.data.refusal import Refusal


def read(path, records_per_shard=2, **options):
    options = FormatOptions(records_per_shard=records_per_shard, **options)
    slices = plan_file(str(path), options)
    found = [record for piece in slices for record in read_slice(piece, options)]
    assert [number for number, _ in found] == list(range(len(found)))
    assert sum(piece.records for piece in slices) == len(found) == count_records(str(path))
    return [record for _, record in found]


RECORDS = [
    {"a": 'a "quote", a \\ and a }'},
    {"b": [1, {"c": "]["}], "d": {}},
    {},
    {"e": "\\"},
    {"f": "ü✓\n\t"},
    [1, [2]],
    {"g": "[{" * 50},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("records_per_shard", [1, 2, 100])
def test_every_record_equals_what_json_parses(tmp_path, indent, records_per_shard):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert read(path, records_per_shard) == RECORDS
    path.write_bytes(b"\xef\xbb\xbf\r\n " + json.dumps(RECORDS, indent=indent).encode() + b"\n\n")
    assert read(path, records_per_shard) == RECORDS


def test_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS[:5]) + "\r\n\n \n")
    assert read(path) == RECORDS[:5]


@pytest.mark.parametrize("content", [b"", b"   \n", b"[]", b" [ \n ] "])
def test_empty_file_has_no_records(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("content", "outcomes"),
    [
        (b'[{"a": 1}, 17, {"a": 2}]', [dict, int, dict]),
        (b'[null, {"a": 2}, "end"]', [None.__class__, dict, str]),
        (b'[{"a": 1} {"a": 2}]', [dict, dict]),  # a lost comma between records does no harm
        (b'[{"a": 1}, {"a": }, {"a": 2}]', [dict, Refusal, dict]),
        (b'[{"a": 1}, {"a": 2}, {"a": "cut o', [dict, dict, Refusal]),
        (b'[{"a": 1}, {"a": {"b": 2}, {"a": 3}]', [dict, Refusal, dict]),
        (b'[{"a": 1, "b": "lost quote}, {"a": 2, "b": "]"}, {"a": 3}]', [Refusal, dict, dict]),
        (b'[{"a": "{", "c": [{"a": 1}, {"a": 2}]}, {"a": 3}]', [dict, dict]),
        (b'[\n{"a": "lost quote},\n{"a": 1}\n]', [Refusal, dict]),
        (b'[{"a": 1}]{"a": 2}', [dict, Refusal, dict]),
        (b"<html>no such file</html>", [Refusal]),
        (b'[{"a": "\xff"}, {"a": 1}]', [Refusal, dict]),
        (b"[" + b"[" * 5000 + b"]" * 5000 + b"]", [Refusal]),  # Python 3.13 parses this, 3.11 does not
        (b"[" + b"[" * 500 + b"]" * 500 + b"]", [list]),
        (b'[{"a": ' + b"[{}]," * 800 + b"0}, {}]", [Refusal, dict]),
        (b'[{"a": ' + b"9" * 5000 + b"}]", [Refusal]),
    ],
)
def test_damage_costs_only_the_damaged_record(tmp_path, content, outcomes):
    (tmp_path / "a.json").write_bytes(content)
    assert [type(record) for record in read(tmp_path / "a.json", 1)] == outcomes


def test_large_file_is_searched_once_whatever_its_records_begin_with(tmp_path):
    """Searching to the end of the file from every record, for a first key that never comes again, took minutes."""
    records = [{"id": 0}] + [{"image": i, "x": "y" * 400} for i in range(20_000)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    start_time = time.process_time()
    assert count_records(str(tmp_path / "a.json")) == 20_001
    assert time.process_time() - start_time < 10


def test_many_broken_records_in_a_large_file(tmp_path):
    good, broken = json.dumps({"id": 1, "x": "y" * 400}), '{"id": 1, "x": "lost quote}'
    (tmp_path / "a.json").write_text("[" + ", ".join([*[good] * 99, broken] * 60) + "]")
    records = read(tmp_path / "a.json", 1000)
    assert sum(isinstance(record, dict) for record in records) == 99 * 60
    assert sum(isinstance(record, Refusal) for record in records) == 60


def test_an_enormous_record_is_not_parsed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"a": 1}, {"a": "x" * 2000}, {"a": 2}]))
    records = read(tmp_path / "a.json", max_record_bytes=1000)
    assert records[1].kind == "too large" and "2009 bytes" in str(records[1])
    assert [records[0], records[2]] == [{"a": 1}, {"a": 2}]
