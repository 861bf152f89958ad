"""Archives that are published in parts."""

import io
import tarfile

import pytest

from alignvlm_jax.downloads.archives import unpack_parts
from alignvlm_jax.errors import UserError


def write_parts(folder, **members):
    """Writes a compressed archive in two parts. Returns their paths."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    parts = [folder / "imgs-0", folder / "imgs-1"]
    parts[0].write_bytes(data.getvalue()[:50])
    parts[1].write_bytes(data.getvalue()[50:])
    return parts


def test_the_parts_of_an_archive_are_unpacked_once(tmp_path):
    parts = write_parts(tmp_path, **{"imgs/a.png": b"image"})
    unpack_parts(parts, tmp_path / "imgs", is_quiet=True)
    assert (tmp_path / "imgs" / "a.png").read_bytes() == b"image"
    parts[0].write_bytes(b"")
    unpack_parts(parts, tmp_path / "imgs", is_quiet=True)


@pytest.mark.parametrize("name", ["../outside", "imgs/../../outside"])
def test_a_member_that_leads_elsewhere_is_refused(tmp_path, name):
    folder = tmp_path / "cache"
    folder.mkdir()
    parts = write_parts(folder, **{"imgs/a.png": b"image", name: b"evil"})
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_parts(parts, folder / "imgs", is_quiet=True)
    assert not (folder / "imgs").exists() and not list(tmp_path.rglob("outside"))
