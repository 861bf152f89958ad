"""Files of a bucket are copied to the disk once, and again when they change."""

import pytest

from alignvlm_jax.downloads import bucket_copy
from alignvlm_jax.downloads.bucket_copy import local_copy, model_folder
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location


@pytest.fixture(params=["gcs_bucket", "s3_bucket"])
def model(request, tmp_path, monkeypatch):
    """URL of the folder of a model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = open_location(request.getfixturevalue(request.param)) / "m"
    for name in ("config.json", "model.safetensors", "README.md", "original/consolidated.00.pth"):
        (folder / name).write_bytes(name.encode())
    return folder


def _names(folder):
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".versions.json")
    )


def test_only_what_has_changed_is_copied(model, tmp_path, monkeypatch):
    folder = model_folder(model, with_weights=False)
    assert folder.parent == tmp_path / "cache" / "alignvlm" / "buckets" and _names(folder) == ["config.json"]
    assert model_folder(model) == folder and _names(folder) == ["config.json", "model.safetensors"]
    weights = (folder / "model.safetensors").stat()
    (model / "config.json").write_bytes(b"CONFIG.JSON")  # another version of the same size
    (folder / ".model.safetensors.0123").write_bytes(b"half")  # of a run that was killed
    (folder / "gone.json").write_bytes(b"{}")  # of an object that was deleted
    model_folder(model)
    assert _names(folder) == ["config.json", "model.safetensors"]
    assert (folder / "config.json").read_bytes() == b"CONFIG.JSON"
    assert (folder / "model.safetensors").stat() == weights
    copied = []
    monkeypatch.setattr(bucket_copy, "_copy", lambda url, *_, **__: copied.append(url))
    model_folder(model)
    assert not copied  # nothing has changed
    local_copy(model)
    assert sorted(copied) == [f"{model}/README.md", f"{model}/original/consolidated.00.pth"]


def test_what_is_wrong_is_named(model, tmp_path, monkeypatch):
    for missing in (model.parent / "other", f"{model.parent}-other/m"):
        with pytest.raises(UserError, match="other.*: no such folder in the bucket"):
            local_copy(missing)
    with monkeypatch.context() as patch:
        patch.setattr(bucket_copy.shutil, "disk_usage", lambda folder: bucket_copy.shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(UserError, match="need 0.0 GB in .* 0.0 GB are free: name another disk in XDG_CACHE_HOME"):
            model_folder(model)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be copied to .*XDG_CACHE_HOME"):
        model_folder(model)
