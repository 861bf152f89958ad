"""Shards that are missing or there twice, by their names."""

import re

import pytest

from alignvlm_jax.data.shard_names import gaps, select

HASHES = "6f3344faa23e9b0a", "b42a775f407cee45"


@pytest.mark.parametrize(
    ("names", "read", "message"),
    [
        # PKU-YuanGroup/ImgEdit#3: parts 0, 1, 4 and 5 of 6.
        ([f"d/test-{i:05}-of-00006.parquet" for i in (0, 1, 4, 5)], 4, "2 of 6 shards are missing, test-00002-"),
        ([f"d/train-{i:02}-of-02" for i in (1,)], 1, "1 of 2 shards is missing, train-00-of-02"),
        # Files of huggingface/datasets before 2023 have a hash each.
        ([f"d/train-0000{i}-of-00002-{hash}.parquet" for i, hash in enumerate(HASHES)], 2, ""),
        ([f"d/train-00000-of-00002-{HASHES[0]}.parquet"], 1, "1 of 2 shards is missing, train-00001-of-00002.parquet"),
        ([f"d/train-00000-of-00001-{hash}.parquet" for hash in HASHES], 1, "two uploads are side by side"),
        (["d/v-00000-of-00001.parquet", "d/v-00000-of-00001 (1).parquet"], 1, "two uploads are side by side"),
        # Before and after the publisher cut the split into other shards. The complete upload is read.
        (["d/v-00000-of-00002", "d/v-00000-of-00001"], 1, "v-\\*-of-00001 and v-\\*-of-00002; remove one"),
        # TFDS, and shards that count from 1.
        (["d/a-train.tfrecord-00000-of-00001", "d/a-test.tfrecord-00000-of-00001"], 2, ""),
        (["d/model-00001-of-00002.safetensors", "d/model-00002-of-00002.safetensors"], 2, ""),
        # Folders have sets of their own, and other names belong to no set.
        (["a/v-00000-of-00001.parquet", "b/v-00000-of-00001.parquet", "b/notes.parquet"], 3, ""),
        ([f"hub/snapshots/{c * 40}/v-00000-of-00001.parquet" for c in "ab"], 2, "two revisions are side by side, a+ "),
    ],
)  # fmt: skip
def test_shards(names, read, message):
    """PKU-YuanGroup/ImgEdit#3, huggingface/datasets (file names of `push_to_hub`), tensorflow/datasets."""
    selection = select(names)
    assert len(selection.files) == read
    assert bool(selection.missing) == bool(message)
    if message:
        assert re.search(message, selection.missing[0]), selection.missing


def test_shards_that_were_left_out_on_purpose_are_not_missing():
    assert not select(["d/t-00000-of-00002"], exists=lambda file: file == "d/t-00001-of-00002").missing
    assert select(["d/t-00000-of-00002"], exists=lambda file: False).missing


def test_gaps_in_numbered_files():
    """img2dataset numbers its archives, and a shard that failed leaves a gap (rom1504/img2dataset#159)."""
    assert gaps(["d/00000.tar", "d/00001.tar", "d/00003.tar"]) == ["d: the numbered files leave out 00002.tar"]
    assert not gaps(["d/00000.tar", "d/00001.tar"]) and not gaps(["d/2019.tar", "d/2024.tar"]) and not gaps([])
    assert not gaps(["d/1.tar", "d/999999999999.tar"])
