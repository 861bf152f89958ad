"""Files that are no images: each refusal says what the file is and what to do."""

import base64
import gzip
import io
import struct
import sys
import types
import zipfile

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from alignvlm_jax.data.file_kinds import identify
from alignvlm_jax.data.images import image_size, open_image
from alignvlm_jax.errors import UserError
from tests.data.tiff_files import color_scene


def encode(image: PIL.Image.Image, format_name: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "contents")
    return buffer.getvalue()


def media(brand: bytes, compatible: bytes = b"mif1") -> bytes:
    """Returns the start of an ISO media file."""
    brands = brand + bytes(4) + compatible
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(400)


@pytest.fixture(autouse=True)
def no_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    PIL.Image.init()
    monkeypatch.setattr(PIL.Image, "OPEN", {name: PIL.Image.OPEN[name] for name in PIL.Image.OPEN if name != "HEIF"})
    monkeypatch.setattr(PIL.Image, "ID", [name for name in PIL.Image.ID if name != "HEIF"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


_PAGE = PIL.Image.fromarray(color_scene())

_KINDS = [
    (media(b"heic"), "HEIC", "magick FILE page.png.*pip install pillow-heif"),  # hermes-agent#67848, Pillow#2806
    (media(b"mif1", b"heic"), "HEIC", "heif-convert"),
    (media(b"isom"), "a video .MP4 or QuickTime, 'isom'.", "ffmpeg -i FILE"),
    (media(b"qt  "), "a video", "ffmpeg"),
    (media(b"crx "), "raw photo of a camera .CR3.", "magick"),
    (b"\x1aE\xdf\xa3" + bytes(40), "a video .Matroska", "ffmpeg"),
    (b"RIFF\0\0\0\0AVI LIST" + bytes(40), "a video .AVI.", "ffmpeg"),
    (b"RIFF\0\0\0\0WAVEfmt " + bytes(40), "a sound file .WAV.", "Remove"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript or EPS file", "gs "),
    (b"8BPS\0\1" + bytes(40), "a Photoshop file", "magick"),
    (b"\xff\x0a" + bytes(40), "a JPEG XL image", "djxl"),
    (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL image", "djxl"),
    (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "raw photo of a camera .CR2.", "magick"),
    (b"FUJIFILMCCD-RAW " + bytes(40), "raw photo of a camera .RAF.", "magick"),
    (b'<?xml version="1.0"?>\n<svg xmlns="">', "an SVG drawing", "rsvg-convert"),
    (b"\n<!DOCTYPE html><html><head>", "an HTML page", "Download the image again"),  # Pillow#9094
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML file", "Download"),
    (b'{"error": "Invalid username or password."}', "a JSON file", "Download"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer", "git lfs pull"),
    (b"../../.git/annex/objects/a/b/SHA256E-s1", "a git-annex pointer", "git annex get"),
    (b"data:image/png;base64," + base64.b64encode(encode(_PAGE)), "a data URL", "Decode the base64"),
    (base64.b64encode(encode(_PAGE)), "the base64 text of a file", "base64 -d"),
    (b"https://example.org/page.png\n", "a link .https://example.org/page.png.", "Download"),
    (b"[InternetShortcut]\r\nURL=https://example.org", "a link", "Download"),
    (b"\0\5\x16\7\0\2\0\0Mac OS X", "companion file of macOS", "the file without `._`"),  # openneuro#2520
    (zip_of("page.png"), "an archive .zip.", "unzip FILE"),
    (zip_of("word/document.xml"), "an office document", "soffice"),
    (gzip.compress(encode(_PAGE)), "an archive .gzip.", "gunzip"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(40), "Office document or Thumbs.db", "soffice"),
    (bytes(128) + b"DICM" + bytes(40), "a medical image .DICOM.", "dcm2img"),
    (b"\0\0\2\0\1\0\x10\x10" + bytes(40), "a mouse cursor", "magick"),
    (b"\x89PNG\n\x1a\n" + encode(_PAGE)[8:], "PNG damaged by a transfer in text mode", "as binary"),
    (
        encode(_PAGE, "JPEG2000").replace(b"\0\3\7\1\1\7\1\1\7", b"\0\3\x0b\1\1\x0b\1\1\x0b"),
        "JPEG 2000 .*3 x 12",
        "-depth 8",
    ),
    (bytes(500), "500 zero bytes", "again"),
    (encode(_PAGE, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "JPEG of 12 bits", "magick"),
    (b"Scanned on Monday", "read .17 bytes, which begin 53 63 61", "`file`"),
]


@pytest.mark.parametrize("data, what, next_step", _KINDS)
def test_what_a_file_is(data, what, next_step):
    for read in (open_image, image_size):
        with pytest.raises(
            UserError, match=f"(?s)^photo.jpg: not an image in a format that can be .*{what}.*{next_step}"
        ) as error:
            read(data, name="photo.jpg")
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("start", [b"%PDF-1.7\n%\xe2\xe3", b"\r\n%PDF-1.4\n"])
def test_a_pdf_is_identified_where_none_can_be_read(start):
    kind, next_step = identify(start)
    assert kind == "a PDF" and "pdftoppm -r 200 -png FILE" in next_step


def test_readable_images_are_not_mistaken():
    for format_name in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000", "ICO", "TGA", "PCX", "DIB"):
        assert open_image(encode(_PAGE, format_name)).mode == "RGB"


@pytest.mark.parametrize("format_name", ["BMP", "DIB", "ICO", "TGA"])
def test_alpha_of_zeros_is_padding(format_name):
    """32-bit files whose fourth byte is not used are not blank (SixLabors/ImageSharp#369, #581)."""
    padded = PIL.Image.fromarray(np.concatenate([color_scene(), np.zeros((16, 20, 1), np.uint8)], axis=-1))
    options = {"sizes": [(20, 16)]} if format_name == "ICO" else {}
    np.testing.assert_array_equal(open_image(encode(padded, format_name, **options)), color_scene())


class FakeHeifFile(PIL.ImageFile.ImageFile):
    """Stands for the image class of pillow-heif."""

    format = "HEIF"

    def _open(self):
        self._mode, self._size, self.tile = "RGB", (20, 16), []

    def load(self):
        self.im = _PAGE.im


def test_heic_is_read_if_its_plugin_is_installed(monkeypatch):
    """How the plugin of HEIF is registered: by the user, or by the reader."""

    def register_heif_opener():
        PIL.Image.register_open("HEIF", FakeHeifFile, lambda prefix: prefix[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    assert "HEIF" not in PIL.Image.OPEN
    for _ in range(2):
        np.testing.assert_array_equal(open_image(media(b"heic")), color_scene())


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "page.png").symlink_to("gone.png")
    with pytest.raises(UserError, match="page.png: a link to 'gone.png', which does not exist.*"):
        open_image(tmp_path / "page.png")
    with pytest.raises(UserError, match="https://example.org/page.png: a link, not a file.*Download"):
        open_image("https://example.org/page.png")
    with pytest.raises(UserError, match="^data:image/png;base64,AAAA.*: a data URL, not a file"):
        open_image("data:image/png;base64," + 2000 * "A")
    with pytest.raises(UserError, match="^/9j/AAAA.*: the base64 text of an image, not a path"):
        open_image("/9j/" + 2000 * "A")
