"""A folder appears complete or not at all, on a disk and in a bucket."""

import pytest

from alignvlm_jax.checkpoints.new_folder import UNFINISHED, new_folder
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location


@pytest.mark.parametrize("place", ["tmp_path", "gcs_bucket", "s3_bucket"])
def test_a_folder_is_complete_or_absent(place, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = open_location(request.getfixturevalue(place)) / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(folder) as scratch:
        (scratch / "a").write_text("half")
        raise KeyboardInterrupt
    assert not folder.exists()
    with new_folder(folder) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "a").write_text("whole")
    assert (folder / "deep" / "a").read_text() == "whole" and [path.name for path in folder.iterdir()] == ["deep"]
    with pytest.raises(UserError, match="exists already and is not empty"), new_folder(folder):
        pass
    assert not (tmp_path / "gs:").exists() and not (tmp_path / "s3:").exists()


def test_what_a_killed_run_left_in_a_bucket_is_replaced(gcs_bucket):
    folder = open_location(gcs_bucket) / "out"
    for name in (UNFINISHED, "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"")
    with new_folder(folder) as scratch:
        (scratch / "config.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
