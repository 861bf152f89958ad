"""Archives of captioned images, complete and damaged; nothing in them is ever unpacked to disk."""

import gzip
import json
import tarfile

import pytest

from alignvlm_jax.data.formats.conversation import FormatOptions, Refused
from tests.data.formats.samples import add_file, image_bytes, read_all, write_tar


@pytest.mark.parametrize(("name", "mode"), [("00012.tar", "w"), ("00012.tar.gz", "w:gz")])
def test_an_archive(tmp_path, name, mode):
    folder = tmp_path / "cc12m"
    folder.mkdir()
    found = read_all("webdataset", write_tar(folder / name, range(3), mode=mode))
    assert [f.id for f in found] == [f"00012/{i:09d}" for i in range(3)]
    assert found[2].images == [image_bytes(2, format="JPEG")] and found[2].source == "cc12m"
    assert found[2].messages == [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Caption 2"}]},
    ]


def test_an_instruction(tmp_path):
    (found,) = read_all("webdataset", write_tar(tmp_path / "0.tar", range(1)), FormatOptions(instruction="Describe."))
    assert found.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Describe."}]


def archive_of(path, *files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            add_file(archive, name, content)
    return path


def test_captions_in_json_and_unused_files(tmp_path):
    caption = json.dumps({"caption": "From JSON"}).encode()
    path = archive_of(
        tmp_path / "0.tar",
        ("a/1.PNG", image_bytes(1)),
        ("a/1.seg.npy", b"x"),
        ("a/1.json", caption),
        ("._hidden", b"x"),
        ("README", b"x"),
    )
    (found,) = read_all("webdataset", path)
    assert found.id == "0/a/1" and found.images == [image_bytes(1)]
    assert found.messages[1]["content"][0]["text"] == "From JSON"


def test_incomplete_samples_are_refused_by_name(tmp_path):
    path = archive_of(
        tmp_path / "0.tar",
        ("1.jpg", b"x"),
        ("2.txt", b"no image"),
        ("3.jpg", b"x"),
        ("3.txt", b"\xff\xfe"),
        ("4.jpg", b"x"),
        ("4.json", b"{"),
        ("5.jpg", b"x"),
        ("5.json", b"[]"),
        ("6.jpg", b"x"),
        ("6.jpg", b"y"),
        ("7.jpg", b"x" * 600),
        ("8.jpg", b"x"),
        ("8.txt", b"good"),
    )
    found = read_all("webdataset", path, FormatOptions(max_record_bytes=500))
    kinds = {f.where.rsplit(": ")[-1]: f.kind for f in found[:-1]}
    assert kinds == {
        "1": "empty conversation",
        "2": "missing image",
        "3": "text encoding",
        "4": "unreadable record",
        "5": "unreadable record",
        "6": "unreadable record",
        "7": "too large",
    }
    assert found[-1].id == "0/8"


def test_links_and_paths_lead_nowhere(tmp_path):
    """The archive would write outside its folder, and show a file there, if it were unpacked carelessly."""
    (tmp_path / "secret.txt").write_text("not to be trained on")
    archive_file = tmp_path / "a" / "b" / "0.tar"
    archive_file.parent.mkdir(parents=True)

    def add_link(archive, name, kind, target):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, str(target)
        archive.addfile(link)

    with tarfile.open(archive_file, "w") as archive:
        add_link(archive, "1.jpg", tarfile.SYMTYPE, "/etc/hostname")
        add_file(archive, "1.txt", b"a caption")
        add_file(archive, "../../2.jpg", image_bytes(0))
        add_file(archive, "../../2.txt", b"outside")
        add_link(archive, "3.jpg", tarfile.CHRTYPE, "")
        add_file(archive, f"{tmp_path}/4.jpg", image_bytes(0))
        add_link(archive, f"{tmp_path}/4.txt", tarfile.SYMTYPE, tmp_path / "secret.txt")
        add_link(archive, "way", tarfile.SYMTYPE, tmp_path)
        add_file(archive, "way/5.jpg", image_bytes(0))
        add_link(archive, "way/5.txt", tarfile.LNKTYPE, "../../secret.txt")
    with tarfile.open(archive_file) as archive:  # careless unpacking does harm
        careless = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}  # Python 3.11.4 on
        archive.extractall(tmp_path / "x" / "y", **careless)
    assert (tmp_path / "2.txt").exists() and (tmp_path / "5.jpg").exists()
    for path in ("2.jpg", "2.txt", "4.jpg", "4.txt", "5.jpg"):
        (tmp_path / path).unlink()
    before = sorted(tmp_path.rglob("*"))
    found = read_all("webdataset", archive_file)
    expected = ["missing image", "accepted", "missing image", "empty conversation", "empty conversation"]
    assert [getattr(f, "kind", "accepted") for f in found] == expected
    assert found[1].images == [image_bytes(0)]
    assert "not to be trained on" not in repr(found)
    assert sorted(tmp_path.rglob("*")) == before


def kinds(path):
    return [f.kind if isinstance(f, Refused) else "accepted" for f in read_all("webdataset", path)]


def test_truncated_archive_keeps_its_complete_samples(tmp_path):
    path = write_tar(tmp_path / "0.tar", range(4))
    with tarfile.open(path) as archive:
        third = archive.getmember("000000002.txt").offset
        end = archive.offset
    whole = path.read_bytes()
    path.write_bytes(whole[: third + 600])
    assert kinds(path) == ["accepted", "accepted", "damaged file", "damaged file"]
    path.write_bytes(whole[:end])  # without the end-of-archive mark: more may be missing
    assert kinds(path) == ["accepted"] * 3 + ["damaged file"] * 2
    compressed = gzip.compress(write_tar(tmp_path / "1.tar", range(80)).read_bytes())
    path.write_bytes(compressed[: len(compressed) // 2])
    assert kinds(path)[0] == "accepted" and kinds(path)[-1] == "damaged file"


def test_damage_in_the_middle_is_not_mistaken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "0.tar", range(4))
    with tarfile.open(path) as archive:
        start = archive.getmember("000000002.jpg").offset
    whole = path.read_bytes()
    for damage in (b"\xff" * 512, bytes(1024)):  # garbage, and a hole as left by disks
        path.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
        assert kinds(path) == ["accepted", "damaged file", "damaged file"]


def test_no_archive_at_all(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>" * 100)
    assert kinds(tmp_path / "0.tar") == ["damaged file"]
    (tmp_path / "1.tar").write_bytes(b"")
    assert kinds(tmp_path / "1.tar") == ["damaged file"]


def test_other_formats_of_images(tmp_path):
    """webdataset/webdataset#56: images of other formats than the usual ones were passed over by their endings."""
    path = archive_of(
        tmp_path / "a.tar",
        ("a.jp2", image_bytes(0, format="JPEG2000")),
        ("a.txt", b"A."),
        ("b.pdf", b""),
        ("b.txt", b"B."),
    )
    read, refused = read_all("webdataset", path)
    assert len(read.images) == 1 and "pdf. Images end in jpg" in refused.why
