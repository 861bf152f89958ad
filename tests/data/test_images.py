"""Pictures as documents come: one scene in every disguise must come out the same, and bad files say their name."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data.images import open_image, to_rgb
from alignvlm_jax.errors import UserError


def _encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _scene():
    """Four grey quarters, distinguishable under every rotation and flip; 20 wide, 12 high."""
    page = np.zeros((12, 20), np.uint8)
    page[:6, :10], page[:6, 10:], page[6:, :10], page[6:, 10:] = 0, 85, 170, 255
    return page


def _check(image, tolerance=0):
    assert image.mode == "RGB"
    assert image.size == (20, 12)
    difference = np.abs(np.asarray(image).astype(int) - _scene()[..., None])
    assert difference.max() <= tolerance


def test_grey_palette_and_rgb():
    page = PIL.Image.fromarray(_scene())
    _check(open_image(_encode(page)))
    _check(open_image(_encode(page.convert("RGB"))))
    _check(open_image(_encode(page.convert("P"))))
    _check(open_image(_encode(page.convert("P"), "GIF")), tolerance=2)


def test_black_and_white():
    image = open_image(_encode(PIL.Image.fromarray(_scene() > 100)))
    np.testing.assert_array_equal(np.unique(np.asarray(image)), [0, 255])


def test_cmyk():
    _check(open_image(_encode(PIL.Image.fromarray(_scene()).convert("RGB").convert("CMYK"), "TIFF")), tolerance=1)
    _check(open_image(_encode(PIL.Image.fromarray(_scene()).convert("RGB").convert("CMYK"), "JPEG")), tolerance=40)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits(format):
    deep = PIL.Image.fromarray(_scene().astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    _check(open_image(_encode(deep, format)))


def test_wide_integers_and_floats():
    _check(to_rgb(PIL.Image.fromarray(_scene().astype(np.int32) * 257)))
    _check(to_rgb(PIL.Image.fromarray(_scene().astype(np.float32) / 255)))
    _check(to_rgb(PIL.Image.fromarray(_scene().astype(np.float32))))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_becomes_white(mode):
    page = PIL.Image.fromarray(np.zeros_like(_scene())).convert(mode)
    page.putalpha(PIL.Image.fromarray(255 - _scene()))
    _check(open_image(_encode(page)))


def test_transparent_colours_become_white():
    """Palette entry 0 and the grey value 85 declared transparent, without an alpha channel."""
    palette = PIL.Image.fromarray(_scene()).convert("P")
    corner = open_image(_encode(palette, transparency=palette.getpixel((0, 0)))).getpixel((0, 0))
    assert corner == (255, 255, 255)
    grey = open_image(_encode(PIL.Image.fromarray(_scene()), transparency=85))
    assert grey.getpixel((15, 2)) == (255, 255, 255) and grey.getpixel((0, 0)) == (0, 0, 0)
    colour = open_image(_encode(PIL.Image.fromarray(_scene()).convert("RGB"), transparency=(85, 85, 85)))
    assert colour.getpixel((15, 2)) == (255, 255, 255)


# What a camera held this way stores: the inverse of what the viewer must do.
_STORED = {
    1: lambda page: page,
    2: lambda page: page[:, ::-1],
    3: lambda page: page[::-1, ::-1],
    4: lambda page: page[::-1],
    5: lambda page: page.T,
    6: lambda page: np.rot90(page, 1),
    7: lambda page: page[::-1, ::-1].T,
    8: lambda page: np.rot90(page, -1),
}


@pytest.mark.parametrize("orientation", sorted(_STORED))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation(orientation, format):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(_STORED[orientation](_scene())))
    _check(open_image(_encode(stored, format, exif=exif)), tolerance=40 if format == "JPEG" else 0)


def test_first_page_and_first_frame():
    first, second = PIL.Image.fromarray(_scene()), PIL.Image.fromarray(_scene()[::-1].copy())
    for format in ("TIFF", "GIF"):
        _check(open_image(_encode(first, format, save_all=True, append_images=[second])), tolerance=2)


def test_extreme_shape():
    assert open_image(_encode(PIL.Image.new("L", (1, 10000)))).size == (1, 10000)


def _png_claiming(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_pixel_limit(side):
    with pytest.raises(UserError, match="big.png.*pixels"):
        open_image(_png_claiming(side, side), name="big.png")
    with pytest.raises(UserError, match="20 x 12 pixels, more than the limit of 100"):
        open_image(_encode(PIL.Image.fromarray(_scene())), max_pixels=100)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="missing.png: no such image file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="is a folder"):
        open_image(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match="empty.png: the image file is empty"):
        open_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="text.png: not an image"):
        open_image(str(tmp_path / "text.png"))
    with pytest.raises(UserError, match="cannot be opened"):
        open_image("a\0b.png")


def test_postscript_is_not_run():
    program = io.BytesIO()
    PIL.Image.fromarray(_scene()).save(program, "EPS")
    assert PIL.Image.open(io.BytesIO(program.getvalue())).format == "EPS"  # what PIL alone would do
    with pytest.raises(UserError, match="not an image in a format"):
        open_image(program.getvalue())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8))
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        whole = _encode(noise, format)
        # Half of a file is refused, not read as half a page.
        with pytest.raises(UserError, match="doc-7"):
            open_image(whole[: len(whole) // 2], name="doc-7")
        for _ in range(40):
            broken = bytearray(whole)
            for position in rng.integers(0, len(broken), 5):
                broken[position] = rng.integers(0, 256)
            try:
                assert open_image(bytes(broken)).mode == "RGB"
            except UserError:
                pass
