"""Tests of the files that commands write."""

import os
import stat

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location
from alignvlm_jax.output_files import (
    check_distinct,
    check_writable,
    check_writable_folder,
    open_atomically,
    write_atomically,
)


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


def test_devices_and_pipes_are_written_to(tmp_path, capfd):
    """mawww/kakoune#3827, twpayne/chezmoi#2367: a rename onto /dev/stdout or a pipe replaces it for all programs."""
    print("before")
    for _ in range(2):
        check_writable("/dev/stdout")
        with open_atomically("/dev/stdout") as out:
            out.write("{}\n")
    assert capfd.readouterr().out == "before\n{}\n{}\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open_atomically(pipe) as out:
        out.write("{}")
    assert os.read(reader, 10) == b"{}" and stat.S_ISFIFO(os.stat(pipe).st_mode)
    os.close(reader)
    with pytest.raises(UserError, match="No space left"), open_atomically("/dev/full") as out:
        out.write("{}")


def test_a_link_stays_a_link(tmp_path):
    """The target may be on another disk, which the link was made for (mawww/kakoune#3827)."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "a.json"
    link.symlink_to("disk/b.json")
    with open_atomically(link) as out:
        out.write("{}")
    assert link.is_symlink() and (tmp_path / "disk" / "b.json").read_text() == "{}"


def test_a_folder_and_a_second_option_are_refused(tmp_path):
    """Lightning-AI/litgpt#942: 45 minutes of evaluation, and then the file of results cannot be written."""
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        check_writable(tmp_path)
    check_distinct(json=tmp_path / "a", predictions=tmp_path / "b", out=None)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(UserError, match="--json and --predictions are the same file"):
        check_distinct(json=tmp_path / "a", predictions=tmp_path / "link")
    with pytest.raises(UserError, match="IMAGE and --out are the same file"):
        check_distinct(image=tmp_path / "a", out=tmp_path / "a")


@pytest.mark.parametrize("store", ["gcs_bucket", "s3_bucket"])
def test_files_in_a_bucket(store, request, tmp_path, monkeypatch):
    """young-geng/EasyLM#25: a bucket was given, and part of the output was not there."""
    monkeypatch.chdir(tmp_path)
    bucket = request.getfixturevalue(store)
    file = f"{bucket}/new/a.json"
    check_writable(file)
    check_writable_folder(f"{bucket}/new")
    assert not open_location(file).parent.exists()  # a check leaves nothing
    with open_atomically(file) as out:
        out.write("é")
        assert not open_location(file).exists()
    assert open_location(file).read_bytes() == "é".encode()
    with pytest.raises(ZeroDivisionError), open_atomically(file) as out:
        out.write("second")
        raise ZeroDivisionError
    assert open_location(file).read_bytes() == "é".encode()
    with pytest.raises(UserError, match="--json and --predictions are the same file"):
        check_distinct(json=file, predictions=file)
    with pytest.raises(UserError, match="this is a bucket: name a file in it"):
        check_writable(bucket)
    with pytest.raises(UserError, match="there is no bucket"):
        check_writable(f"{bucket}-other/a.json")
    with pytest.raises(UserError, match=r"cannot be written \(there is no such bucket\)"):
        write_atomically(f"{bucket}-other/a.json", b"")
    assert not list(tmp_path.iterdir())
