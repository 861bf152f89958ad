"""PNG files with large metadata, and with transparent colors of any depth."""

import io
import itertools
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from alignvlm_jax.data.images import image_size, open_image
from alignvlm_jax.data.rgb import to_rgb
from alignvlm_jax.errors import UserError
from tests.data.tiff_files import color_scene, scene

_GRAY, _COLOR = 0, 2
_HUGE = zlib.compress(b"<history>" * 130_000)  # 1.1 MiB once unpacked
_XMP = b"XML:com.adobe.xmp\0\1\0\0\0"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, bits: int = 8, color_type: int = _GRAY, before: bytes = b"", after: bytes = b"") -> bytes:
    """Returns a PNG file with chunks before and after its pixels."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1, 1).astype(np.uint32) >> np.arange(bits - 1, -1, -1, dtype=np.uint32) & 1
    rows = np.packbits(rows.astype(np.uint8).reshape(height, -1), axis=-1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(data)), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


_METADATA = {
    "XMP": chunk(b"iTXt", _XMP + _HUGE),
    "comment": chunk(b"zTXt", b"Comment\0\0" + _HUGE),
    "EXIF as text": chunk(b"zTXt", b"Raw profile type exif\0\0" + _HUGE),
    "profile": chunk(b"iCCP", b"scanner\0\0" + _HUGE),
    "many": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) * 65,
    "truncated": chunk(b"pHYs", b"\0") + chunk(b"gAMA", b"") + chunk(b"cHRM", b"\0") + chunk(b"sRGB", b""),
    "wrong checksum": chunk(b"tEXt", b"Comment\0abc")[:-4] + b"\0\0\0\0",
    "unknown compression": chunk(b"zTXt", b"Comment\0\7abc") + chunk(b"iCCP", b"scanner\0\7abc"),
}


@pytest.mark.parametrize("name", _METADATA)
def test_metadata_does_not_stop_an_image(name):
    """Pillow#2445, #8363 and KatherLab/STAMP#76: sound pixels with metadata that unpacks to more than a mebibyte."""
    limits = PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.PngImagePlugin.MAX_TEXT_MEMORY
    for where in ("before", "after"):
        data = png(scene(), **{where: _METADATA[name]})
        np.testing.assert_array_equal(np.asarray(open_image(data))[..., 0], scene())
        assert image_size(data) == (20, 16)
    assert limits == (PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.PngImagePlugin.MAX_TEXT_MEMORY)


def test_orientation_in_metadata_of_any_size():
    history = b"<history>" * 130_000
    xmp = b'<x:xmpmeta tiff:Orientation="6">' + history
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    texts = [
        chunk(b"iTXt", _XMP[:-4] + b"\0\0\0\0" + xmp),
        chunk(b"iTXt", _XMP + zlib.compress(xmp)),
        chunk(b"eXIf", exif.tobytes()[6:]),
    ]
    stored = np.ascontiguousarray(np.rot90(scene(), 1))
    for text, where in itertools.product(texts, ("before", "after")):
        data = png(stored, **{where: text + _METADATA["profile"]})
        image = open_image(data)
        np.testing.assert_array_equal(np.asarray(image)[..., 0], scene())
        assert image_size(data) == image.size == to_rgb(image).size == (20, 16)
    # Also where the pixels are decoded here.
    data = png(stored.astype(np.uint16) * 257, 16, before=chunk(b"tRNS", b"\1\2") + texts[2])
    np.testing.assert_array_equal(np.asarray(open_image(data))[..., 0], scene())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_gray_value(bits):
    """Pillow compares it with samples of another scale (Pillow#9281, #3379)."""
    largest = 2**bits - 1
    samples = np.rint(scene() / 255 * largest).astype(np.uint16)
    for value in {0, largest, int(samples[10, 9])}:
        expected = np.rint(samples * (255 / largest))
        expected[samples == value] = 255
        data = png(samples, bits, before=chunk(b"tRNS", struct.pack(">H", value)))
        for image in (open_image(data), to_rgb(PIL.Image.open(io.BytesIO(data)))):
            np.testing.assert_allclose(np.asarray(image)[..., 0], expected, atol=1)


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_color(bits):
    samples = np.rint(color_scene() / 255 * (2**bits - 1)).astype(np.uint16)
    if bits == 16:
        samples[0, 0] = samples[10, 9] ^ 1  # differs from the transparent color in a low bit only
    expected = np.rint(samples * (255 / (2**bits - 1)))
    expected[(samples == samples[10, 9]).all(axis=-1)] = 255
    data = png(samples, bits, _COLOR, before=chunk(b"tRNS", struct.pack(">HHH", *samples[10, 9])))
    for image in (open_image(data), to_rgb(PIL.Image.open(io.BytesIO(data)))):
        np.testing.assert_allclose(np.asarray(image), expected, atol=1)


def test_narrow_values_in_sixteen_bits():
    """A camera's 8 or 12 bits in a file of 16 bits are not black."""
    for bits in (8, 12):
        share = np.rint(scene() / 255 * (2**bits - 1)).astype(np.uint16)
        np.testing.assert_allclose(np.asarray(open_image(png(share, 16)))[..., 0], scene(), atol=1)
        share = np.rint(color_scene() / 255 * (2**bits - 1)).astype(np.uint16)
        np.testing.assert_allclose(np.asarray(open_image(png(share, 16, _COLOR))), color_scene(), atol=1)


def test_an_image_for_ios_is_named():
    with pytest.raises(UserError, match="page: .*format of iOS apps.*pngcrush"):
        open_image(b"\x89PNG\r\n\x1a\n" + chunk(b"CgBI", b"\0\0\0\0") + png(scene())[8:], name="page")
