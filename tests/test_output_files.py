"""Tests of the files that commands write."""

import os

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.output_files import check_writable, check_writable_folder, open_atomically


def _read_only(monkeypatch):
    """Makes creating files fail as on read-only media, for root, too."""

    def fail(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    monkeypatch.setattr("tempfile.mkstemp", fail)


@pytest.mark.parametrize("name", ["a.json", "new/deep/a.json"])
@pytest.mark.parametrize("check", [check_writable, check_writable_folder])
def test_a_place_is_checked_without_creating_anything(tmp_path, monkeypatch, name, check):
    """huggingface/datasets#2837, allenai/allennlp#4838: a folder on read-only media."""
    check(tmp_path / name)
    _read_only(monkeypatch)
    with pytest.raises(UserError, match=r"cannot be written \(.*Read-only file system"):
        check(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_stands_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        check_writable(tmp_path / "file" / "a.json")
    with pytest.raises(UserError, match="Not a directory"):
        check_writable_folder(tmp_path / "file")
    check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"), open_atomically(tmp_path / "file" / "a.json"):
        pass


def test_a_file_appears_when_it_is_complete(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.json"
    with open_atomically(file) as out:
        out.write("first")
        assert not file.exists()
    assert os.stat(file).st_mode & 0o777 == 0o644
    with pytest.raises(ZeroDivisionError), open_atomically(file) as out:
        out.write("second" * 1000)
        raise ZeroDivisionError
    assert file.read_text() == "first" and [path.name for path in file.parent.iterdir()] == ["a.json"]
    _read_only(monkeypatch)
    with pytest.raises(UserError, match="Read-only file system"), open_atomically(file):
        pass
