"""Image files: one scene is read identically from many encodings, and errors name bad files."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data import images
from alignvlm_jax.data.images import image_size, open_image, to_rgb
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.errors import UserError


def _encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _scene():
    """Returns four gray quarters that differ under every rotation and flip; 20 wide, 12 high."""
    page = np.zeros((12, 20), np.uint8)
    page[:6, :10], page[:6, 10:], page[6:, :10], page[6:, 10:] = 0, 85, 170, 255
    return page


def _check(image, tolerance=0):
    assert image.mode == "RGB"
    assert image.size == (20, 12)
    difference = np.abs(np.asarray(image).astype(int) - _scene()[..., None])
    assert difference.max() <= tolerance


def test_gray_palette_and_rgb():
    page = PIL.Image.fromarray(_scene())
    _check(open_image(_encode(page)))
    _check(open_image(_encode(page.convert("RGB"))))
    _check(open_image(_encode(page.convert("P"))))
    _check(open_image(_encode(page.convert("P"), "GIF")), tolerance=2)


def test_gray_may_stay_gray():
    gray = PIL.Image.fromarray(_scene())
    for page in (gray, PIL.Image.fromarray(_scene().astype(np.uint16) * 257), PIL.Image.fromarray(_scene() > 100)):
        kept, color = open_image(_encode(page), keep_gray=True), open_image(_encode(page))
        assert kept.mode == "L" and color.mode == "RGB"
        np.testing.assert_array_equal(kept.convert("RGB"), color)
    see_through = gray.convert("LA")
    for page in (gray.convert("RGB"), gray.convert("P"), see_through):
        assert open_image(_encode(page), keep_gray=True).mode == "RGB"


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


def test_transparent_colors_become_white():
    """Palette entry 0 and the gray value 85 are declared transparent, without an alpha channel."""
    palette = PIL.Image.fromarray(_scene()).convert("P")
    corner = open_image(_encode(palette, transparency=palette.getpixel((0, 0)))).getpixel((0, 0))
    assert corner == (255, 255, 255)
    gray = open_image(_encode(PIL.Image.fromarray(_scene()), transparency=85))
    assert gray.getpixel((15, 2)) == (255, 255, 255) and gray.getpixel((0, 0)) == (0, 0, 0)
    color = open_image(_encode(PIL.Image.fromarray(_scene()).convert("RGB"), transparency=(85, 85, 85)))
    assert color.getpixel((15, 2)) == (255, 255, 255)


# The pixels that a camera held this way stores: the inverse of the viewer's transpose.
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


@pytest.mark.parametrize("format, what", [("TIFF", "pages"), ("GIF", "frames"), ("WEBP", "frames"), ("PNG", "frames")])
def test_first_page_and_first_frame(format, what, caplog, monkeypatch):
    """Only the first of three frames or pages is read, and a warning is logged once, for the first such file."""
    monkeypatch.setattr(images, "_warned_about", set())
    first, second = PIL.Image.fromarray(_scene()), PIL.Image.fromarray(_scene()[::-1].copy())
    options = {"lossless": True} if format == "WEBP" else {}
    several = _encode(first, format, save_all=True, append_images=[second, first], **options)
    assert PIL.Image.open(io.BytesIO(several)).n_frames == 3
    _check(open_image(_encode(first, format, **options)), tolerance=2)
    assert not caplog.records
    for name in ("one", "another"):
        _check(open_image(several, name=name), tolerance=2)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"one has several {what}: only the first is read")


def test_transparent_first_frame():
    """A GIF whose first frame has a transparent background, which becomes white."""
    frame = PIL.Image.fromarray(_scene()).convert("P")
    hole = frame.getpixel((0, 0))
    animated = _encode(frame, "GIF", save_all=True, append_images=[frame.rotate(180)], transparency=hole, disposal=2)
    image = open_image(animated)
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((15, 2)) == (85, 85, 85)


@pytest.mark.parametrize(
    "format, mode, options, tolerance",
    [
        ("JPEG", "L", {"quality": 95}, 8),
        ("JPEG", "RGB", {"quality": 95, "progressive": True, "subsampling": 0}, 8),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}, 0),
        ("TIFF", "RGB", {"compression": "jpeg", "quality": 95}, 8),
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}, 0),
        ("TIFF", "P", {}, 0),
        ("TIFF", "YCbCr", {}, 1),
        ("WEBP", "RGB", {"lossless": True}, 0),
        ("BMP", "P", {}, 0),
        ("PPM", "L", {}, 0),
        ("JPEG2000", "RGB", {}, 0),
        ("AVIF", "RGB", {"quality": 100}, 4),
        ("ICO", "RGB", {}, 0),
        ("TGA", "RGB", {}, 0),
        ("PCX", "RGB", {}, 0),
    ],
)
def test_formats(format, mode, options, tolerance, tmp_path):
    page = PIL.Image.fromarray(_scene())
    # PIL converts to some modes only from RGB. Palettes are converted directly, because PIL would dither RGB.
    page = page.convert(mode) if mode == "P" else page.convert("RGB").convert(mode)
    (tmp_path / "page").write_bytes(_encode(page, format, **options))
    _check(open_image(tmp_path / "page"), tolerance)


def test_fax():
    """One bit per pixel, with the compression of scanners and fax machines."""
    page = PIL.Image.fromarray(_scene() > 100)
    image = open_image(_encode(page, "TIFF", compression="group4"))
    np.testing.assert_array_equal(np.asarray(image), np.where(_scene() > 100, 255, 0)[..., None].repeat(3, axis=2))


def test_sixteen_bits_per_channel():
    """A PNG that Pillow cannot write."""
    rows = (_scene().astype(">u2") * 257)[..., None].repeat(3, axis=2)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
    _check(open_image(_png([(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")])))


@pytest.mark.parametrize("size", [(1, 10000), (10000, 1)])
@pytest.mark.parametrize("rule", ["ovis", "internvl", "anyres_max_9"])
def test_page_one_pixel_wide_becomes_tiles(size, rule):
    """A page one pixel wide or high: every tile shows part of it."""
    image = open_image(_encode(PIL.Image.new("L", size, 200)))
    assert image.size == size
    config = TilingConfig(rule, tile_size=32)
    tiles, valid_hw = cut_tiles(image, plan_tiles(*image.size, config), 32)
    assert 1 <= len(tiles) <= config.max_tiles_per_image
    assert all((tile == 200).any() for tile in tiles) and (valid_hw >= 1).all()


def _png(chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*kind_and_data) for kind_and_data in chunks)


def _png_claiming(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return _png([(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")])


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
    assert PIL.Image.open(io.BytesIO(program.getvalue())).format == "EPS"  # PIL alone would accept it
    with pytest.raises(UserError, match="not an image in a format"):
        open_image(program.getvalue())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8))
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        whole = _encode(noise, format)
        # Half of a file is refused and not read as half a page.
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


@pytest.mark.parametrize(
    "form, orientation",
    [
        *((form, orientation) for form in ("JPEG", "PNG", "WEBP", "TIFF") for orientation in (None, *range(1, 9))),
        ("GIF", None),
        ("BMP", None),
    ],
)
def test_a_size_is_known_without_decoding(form, orientation):
    """The size comes from the header if it is reliable, otherwise from decoding; it is always the image's size."""
    buffer, exif = io.BytesIO(), PIL.Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    options = {"exif": exif} if orientation else {}
    PIL.Image.new("RGB", (37, 21), "red").save(buffer, form, **options)
    data = buffer.getvalue()
    assert image_size(data) == open_image(data).size == ((21, 37) if orientation in (5, 6, 7, 8) else (37, 21))


def test_only_the_header_of_common_formats_is_read():
    for form in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        PIL.Image.effect_noise((400, 300), 90).save(buffer, form)
        damaged = buffer.getvalue()[:2000]
        assert image_size(damaged) == (400, 300)
        with pytest.raises(UserError, match="damaged"):
            open_image(damaged)
        with pytest.raises(UserError, match="400 x 300 pixels, more than the limit of 100"):
            image_size(damaged, max_pixels=100)
    for data, message in [(b"", "page: the image file is empty"), (b"text", "page: not an image")]:
        with pytest.raises(UserError, match=message):
            image_size(data, name="page")


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    """Only a shell expands `~` (Python's documentation of `expanduser`); file:// URLs are those of RFC 8089."""
    monkeypatch.setenv("HOME", str(tmp_path))
    PIL.Image.new("RGB", (3, 2)).save(tmp_path / "a page.png")
    assert open_image("~/a page.png").size == open_image(f"file://{tmp_path}/a%20page.png").size == (3, 2)
