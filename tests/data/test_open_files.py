"""Tests of reading many ArrayRecord files with few file handles."""

import concurrent.futures
import os
import pickle
import random
import types

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from alignvlm_jax.data import open_files
from alignvlm_jax.data.open_files import ArrayRecordFiles, max_open_files

NUM_FILES, RECORDS_PER_FILE = 12, 5


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Instructions that skip the first record of each file, and the records they select."""
    folder, files, expected = tmp_path_factory.mktemp("files"), [], []
    for index in range(NUM_FILES):
        records = [f"{index}.{number}".encode() for number in range(RECORDS_PER_FILE)]
        path = folder / f"{index}.array_record"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        count = RECORDS_PER_FILE - 1
        files.append(types.SimpleNamespace(filename=str(path), skip=1, take=count, examples_in_shard=RECORDS_PER_FILE))
        expected += records[1:]
    return files, expected


def _num_open(files):
    """Returns how many file handles of this process belong to the files."""
    names = {file.filename for file in files}
    handles = [f"/proc/self/fd/{handle}" for handle in os.listdir("/proc/self/fd")]
    return sum(os.readlink(handle) in names for handle in handles if os.path.islink(handle))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to count open files")
def test_few_files_are_open_at_a_time(instructions):
    """huggingface/datasets#6877, google-deepmind/rc-data#4: "Too many open files" with many files."""
    files, expected = instructions
    source = ArrayRecordFiles(files, max_open=3)
    assert len(source) == len(expected)
    order = random.Random(0).sample(range(len(expected)), len(expected))
    for index in order:
        assert source[index] == expected[index]
        assert _num_open(files) <= 3
    assert source.__getitems__(order) == [expected[index] for index in order]


def test_threads_may_read_while_files_are_closed(instructions):
    files, expected = instructions
    source = ArrayRecordFiles(files, max_open=1)
    order = [random.Random(seed).randrange(len(expected)) for seed in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, order)) == [expected[index] for index in order]


def test_a_copy_in_another_process_reads_the_same(instructions):
    files, expected = instructions
    source = ArrayRecordFiles(files, max_open=2)
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[index] for index in range(len(copy))] == expected


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "allowed"),
    [
        (256, 256, None, 16),  # `ulimit -n 256` sets both limits
        (256, 100_000, 400 * 8 + 128, 400),
        (100_000, 100_000, None, 400),
        (-1, -1, None, 400),
    ],
)
def test_the_limit_of_the_process_is_raised_or_respected(monkeypatch, soft, hard, raised, allowed):
    """The soft limit of most systems is 1,024 (macOS: 256), far below the hard one."""
    limits = [(soft, hard)]
    fake = types.SimpleNamespace(
        RLIMIT_NOFILE=7,
        RLIM_INFINITY=-1,
        getrlimit=lambda kind: limits[-1],
        setrlimit=lambda kind, limit: limits.append(limit),
    )
    monkeypatch.setattr(open_files, "resource", fake)
    assert max_open_files(400) == allowed
    assert limits[1:] == ([(raised, hard)] if raised else [])
