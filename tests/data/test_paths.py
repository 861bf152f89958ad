"""Finding files and writing them atomically, locally and in a bucket."""

import pytest
from etils import epath

from alignvlm_jax.data.paths import atomic_file, find_files, open_binary, status
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_local


@pytest.fixture(params=["tmp_path", "gcs_bucket"])
def folder(request):
    return epath.Path(request.getfixturevalue(request.param))


def test_file_appears_complete_or_not_at_all(folder):
    scratch = folder / "scratch"
    scratch.mkdir()
    with atomic_file(folder / "a.txt", scratch) as partial:
        partial.write_text("half")
        assert not (folder / "a.txt").exists()
        partial.write_text("whole")
    assert (folder / "a.txt").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_file(folder / "a.txt", scratch) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert (folder / "a.txt").read_text() == "whole"
    assert list(scratch.glob("*")) == []


def test_files_are_found(folder):
    for name in ("b.tar", "a.tar", "notes.txt", "more/c.tar", "more/deep/d.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)

    def found(pattern):
        return [path.removeprefix(f"{folder}/") for path in find_files(f"{folder}/{pattern}", (".tar",))]

    assert found("") == ["a.tar", "b.tar", "more/c.tar", "more/deep/d.tar"]
    assert found("notes.txt") == ["notes.txt"]  # a file given by name may have any ending
    assert found("*.tar") == ["a.tar", "b.tar"]
    assert found("more/*") == ["more/c.tar", "more/deep"]
    assert found("m*/?.tar") == ["more/c.tar"]
    assert found("no/*.tar") == found("nothing.tar") == found("**/c.tar") == []
    with open_binary(find_files(f"{folder}/a*", ())[0]) as file:
        assert file.read() == b"a.tar"
    assert status(folder / "a.tar").size == 5 and status(folder / "a.tar").is_regular
    assert not status(folder / "more").is_regular


def test_unreadable_file_is_named(folder):
    with pytest.raises(UserError, match="gone.json: cannot be read"), open_binary(str(folder / "gone.json")):
        pass
    assert is_local(folder) == (not str(folder).startswith("gs:"))


def test_a_folder_that_links_to_itself(tmp_path):
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "a.tar").write_text("a")
    assert find_files(str(tmp_path), (".tar",)) == [str(tmp_path / "a.tar")]
