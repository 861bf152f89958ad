"""Tests of the choice of a split's files, with the names that publishers use.

Sources: OpenRLHF/OpenRLHF#367 (train.jsonl and test.jsonl were read as one split), huggingface/datasets#3221.
"""

import json

import pytest

from alignvlm_jax.data import prepare
from alignvlm_jax.data.split_files import select
from alignvlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0]),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], [0]),
        (["train/0000.tar", "val/0000.tar", "extra.tar"], [0, 2]),
        (["TRAIN_part1.json", "dev.json"], [0]),
        (["docvqa_train.json", "docvqa_val.json"], [0]),
        (["train-0.parquet", "train-1.parquet"], [0, 1]),
        (["a.json", "test.json"], [0, 1]),  # nothing tells what a.json is
        (["trainer.json", "tests.json"], [0, 1]),
    ],
)
def test_names_of_splits(files, read):
    files = [f"in/{file}" for file in files]
    chosen, sentence = select(files, "in", "train")
    assert chosen == [files[number] for number in read]
    assert bool(sentence) == (len(read) < len(files))


def test_other_splits():
    files = ["in/train.json", "in/val.json", "in/test.json"]
    assert select(files, "in", "val") == (
        ["in/val.json"],
        "in: only files of the split validation are read (--split), not those of test (1 files), train (1 files)",
    )
    with pytest.raises(UserError, match="splits test and train and validation, but not of mine"):
        select(files, "in", "mine")


def test_a_folder_with_a_test_split_is_not_trained_on(tmp_path, capsys):
    """OpenRLHF/OpenRLHF#367: a folder with train.jsonl and test.jsonl."""
    for split in ("train", "test"):
        turns = [{"from": "human", "value": split}, {"from": "gpt", "value": "A."}]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{split}.jsonl").write_text(json.dumps({"conversations": turns}))
    recipe = prepare.Recipe("llava", (str(tmp_path / "in"),))
    summary = prepare.prepare(
        recipe,
        tmp_path / "out",
        progress=False,
        convert=lambda job, tasks: (prepare.convert_slice(job, task) for task in tasks),
    )
    assert summary.accepted == 1 and "not those of test (1 files)" in capsys.readouterr().err
