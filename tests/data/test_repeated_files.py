"""Tests of files that are there twice, and of folders that are not all there."""

import pytest

from alignvlm_jax.data import repeated_files
from alignvlm_jax.data.prepare import Recipe, prepare
from alignvlm_jax.errors import UserError


def test_files_that_were_given_twice(tmp_path):
    """`--input data data/a.json`: the file is in the folder, too."""
    (tmp_path / "a.json").touch()
    files = [f"{tmp_path}/a.json", f"{tmp_path}/../{tmp_path.name}/a.json", "gs://bucket/a.json"]
    kept, (sentence,) = repeated_files.distinct(files)
    assert kept == [files[0], files[2]] and "1 files were given twice" in sentence


@pytest.mark.parametrize("name", ["a (1).jsonl", "a copy.jsonl", "a - Copy.jsonl"])
def test_copies(tmp_path, name):
    """Browsers and file managers name a second download so."""
    files = [f"{tmp_path}/a.jsonl", f"{tmp_path}/{name}"]
    for file in files:
        with open(file, "w") as stream:
            stream.write("{}")
    assert "seems to be a copy of a.jsonl" in next(repeated_files.copies(files))
    with open(files[1], "a") as stream:
        stream.write("\n{}")
    assert not list(repeated_files.copies(files))


def test_unfinished_downloads(tmp_path):
    """huggingface/dataset-viewer#1463: `partial-train` has the first gigabytes of a split."""
    (tmp_path / "in" / "partial-train").mkdir(parents=True)
    (tmp_path / "in" / "partial-train" / "0000.jsonl").touch()
    (tmp_path / "in" / "b.jsonl.incomplete").touch()
    with pytest.raises(UserError, match="holds only the first part of a split.*interrupted, .*/b.jsonl.incomplete"):
        prepare(Recipe("llava", (str(tmp_path / "in"),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
