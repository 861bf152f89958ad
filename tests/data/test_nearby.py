"""What is said about a folder that is not a data set."""

import pytest

from alignvlm_jax.data.nearby import describe_no_dataset
from alignvlm_jax.data.store import open_dataset
from alignvlm_jax.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("docs/train", "docs/test", "names/1.0.0"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "dataset_info.json").write_text("{}")
    (tmp_path / "data" / "raw").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.parquet").write_bytes(b"")
    (tmp_path / "data" / "half" / "progress").mkdir(parents=True)
    (tmp_path / "data" / "half" / "progress" / "plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("data", "no dataset_info.json. Data sets beneath data: docs/test, docs/train, names/1.0.0"),
        ("data/docs", "Data sets beneath data/docs: test, train"),
        ("data/docs/val", "there is no such folder. Data sets beneath data/docs: test, train"),
        ("data/raw", "no dataset_info.json. Data sets beneath data: docs/test, docs/train, names/1.0.0"),
        (
            "daat/docs",
            "there is no such folder. Data sets beneath .: data/docs/test, data/docs/train, data/names/1.0.0",
        ),
        ("data/half", "not a data set yet: run the same `alignvlm prepare` command again"),
        ("raw", "makes one of its .parquet files. Data sets beneath .: data/docs/test"),
        ("raw/a.parquet", "is not a data set but a file"),
    ],
)
def test_data_sets_beneath_or_near(root, path, said):
    """A wrong --data lists what --data could be, as `git` and `cargo` do for a wrong name."""
    with pytest.raises(UserError) as error:
        open_dataset(path, "train")
    assert said in str(error.value)


def test_many_data_sets_are_cut(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}").mkdir()
        (tmp_path / f"{i:02d}" / "dataset_info.json").write_text("{}")
    assert describe_no_dataset(tmp_path).endswith("05, 06, 07 and 4 more")
