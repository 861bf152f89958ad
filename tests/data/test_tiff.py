"""TIFF files in layouts of scanners, cameras and laboratories: each is the 8-bit page, or is refused by name."""

import io
import itertools
import struct

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data import images
from alignvlm_jax.data.images import open_image
from alignvlm_jax.data.rgb import to_rgb
from alignvlm_jax.errors import UserError
from tests.data.tiff_files import color_scene, directory, scene, tiff


def scaled(share: np.ndarray, bits: int, kind: str = "u", white: float = 1.0) -> np.ndarray:
    """Returns bytes as samples of another type; signed samples have their whole range, and "+" its upper half."""
    share = share.astype(np.float64) / 255
    size = next(size for size in (8, 16, 32, 64) if size >= bits)
    if kind == "f":
        return (share * white).astype(f"f{bits // 8}")
    if kind == "+":
        return np.rint(share * (2 ** (bits - 1) - 1)).astype(f"i{size // 8}")
    values = np.rint(share * (2**bits - 1))
    return (values - 2 ** (bits - 1)).astype(f"i{size // 8}") if kind == "i" else values.astype(f"u{size // 8}")


def assert_page(image: PIL.Image.Image, expected: np.ndarray, tolerance: int = 1):
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, axis=2)
    found = np.asarray(image)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance


_TYPES = [("u", bits, 1) for bits in (8, 10, 12, 14, 16, 24, 32)]
_TYPES += [(kind, bits, 1) for kind in ("i", "+") for bits in (8, 16, 32)]
_TYPES += [("f", bits, white) for bits in (16, 32, 64) for white in (1, 255)] + [("f", 32, 65535), ("f", 64, 4095)]


@pytest.mark.parametrize("kind, bits, white", _TYPES)
def test_gray_and_colors_of_any_type(kind, bits, white):
    """All types in all photometric interpretations, byte orders, planes, tiles and predictors.

    Pillow#414 (12 bits), #5248 and #6642 (16 bits), image-tiff#129 (signed), ITK#6636 (white is zero).
    """
    alpha = np.full((16, 20, 1), 255, np.uint8)
    pages = [(1, scene(), {}), (0, 255 - scene(), {}), (2, color_scene(), {})]
    if kind != "i":
        pages += [
            (1, np.concatenate([scene()[..., None], alpha], axis=-1), {338: (2,)}),
            (2, np.concatenate([color_scene(), alpha], axis=-1), {338: (2,)}),
            (2, np.concatenate([color_scene(), 0 * alpha], axis=-1), {338: (0,)}),
            (5, np.concatenate([255 - color_scene(), 0 * alpha], axis=-1), {}),
        ]
    for (photometric, page, tags), order in itertools.product(pages, "<>"):
        samples = scaled(page, bits, kind, white)
        expected = color_scene() if photometric in (2, 5) else scene()
        layouts = [{}, {"tile": (16, 16), "deflate": True}]
        if samples.ndim == 3:
            layouts += [{"planar": 2}]
        if kind == "f" or bits in (8, 16, 32, 64):
            layouts += [
                {"deflate": True, "predictor": 3 if kind == "f" else 2, "planar": 2 if samples.ndim == 3 else 1}
            ]
        for layout in layouts:
            data = tiff(samples, bits, photometric=photometric, order=order, tags=tags, **layout)
            assert_page(open_image(data), expected, tolerance=2 if photometric == 5 else 1)


@pytest.mark.parametrize("order", ["<", ">"])
def test_big_tiff(order):
    for bits in (8, 12, 16):
        assert_page(open_image(tiff(scaled(scene(), bits), bits, order=order, big=True)), scene())


def test_narrow_values_in_a_wide_type():
    """A camera's 12 bits in a file of 16 bits are not black (zimeon/iiif#23). A page in full range stays as it is."""
    for bits in (8, 10, 12):
        assert_page(open_image(tiff(scaled(scene(), bits).astype(np.uint16))), scene())
        assert_page(open_image(tiff(scaled(color_scene(), bits).astype(np.uint16), photometric=2)), color_scene())
    dark = tiff(scaled(scene() // 4, 16))
    assert_page(open_image(dark), scene() // 4)
    # The tag MaxSampleValue tells 15 bits, which the values alone do not.
    assert_page(open_image(tiff(scaled(scene(), 15).astype(np.uint16), tags={281: (32767,)})), scene())
    assert_page(open_image(tiff(scaled(scene(), 16), tags={281: (65535,)})), scene())


def test_transparency_is_white():
    alpha = 255 - scene()[..., None]
    for bits, photometric in itertools.product((8, 16), (1, 2)):
        page = np.concatenate([np.zeros((16, 20, 1 if photometric == 1 else 3), np.uint8), alpha], axis=-1)
        for kind in (1, 2):
            for planar in (1, 2):
                data = tiff(scaled(page, bits), bits, photometric=photometric, planar=planar, tags={338: (kind,)})
                assert_page(open_image(data), scene())


@pytest.mark.parametrize(
    "orientation, stored", [(3, lambda page: page[::-1, ::-1]), (6, lambda page: np.rot90(page, 1))]
)
def test_orientation(orientation, stored):
    page = np.ascontiguousarray(stored(scene()))
    for bits in (8, 12):
        data = tiff(scaled(page, bits), bits, tags={274: (orientation,)})
        assert_page(open_image(data), scene())
        assert_page(to_rgb(PIL.Image.open(io.BytesIO(data))), scene())


def test_lowest_bit_first():
    """FillOrder 2, of fax machines: the bits of every byte are reversed."""
    for bits in (8, 12, 16):
        plain = tiff(scaled(scene(), bits), bits, tags={266: (2,)})
        size = 16 * 20 * bits // 8
        reversed_bits = bytes(int(f"{byte:08b}"[::-1], 2) for byte in plain[-size:])
        assert_page(open_image(plain[:-size] + reversed_bits), scene())


def test_palette_of_bytes():
    """A palette of 8-bit values where 16 bits are due is not black (Pillow#2157)."""
    ramp = tuple(range(256))
    for factor in (1, 257):
        palette = tuple(value * factor for value in (*ramp, *ramp, *ramp))
        data = tiff(scene(), photometric=3, tags={320: palette})
        assert_page(open_image(data), scene())
        assert_page(to_rgb(PIL.Image.open(io.BytesIO(data))), scene())


def test_images_that_pil_has_opened():
    """An image object of a TIFF file is the same page as the file, before and after PIL has decoded it."""
    for data in (
        tiff(scaled(scene(), 12), 12),
        tiff(scaled(255 - scene(), 16), photometric=0),
        tiff(scaled(scene(), 16, "i")),
        tiff(scaled(scene(), 8, "i")),
        tiff(scaled(scene(), 32)),
        tiff(scaled(255 - scene(), 32, "f"), photometric=0),
    ):
        for is_loaded in (False, True):
            image = PIL.Image.open(io.BytesIO(data))
            if is_loaded:
                image.load()
            assert_page(to_rgb(image), scene())
    # The planes of 16 bits are lost once PIL has decoded them.
    data = tiff(scaled(color_scene(), 16), photometric=2, planar=2)
    assert_page(to_rgb(PIL.Image.open(io.BytesIO(data))), color_scene())
    image = PIL.Image.open(io.BytesIO(data))
    image.load()
    with pytest.raises(ValueError, match="RGB of 3 x 16 unsigned bits.*Pass the path"):
        to_rgb(image)


@pytest.mark.parametrize(
    "samples, options, message",
    [
        (scene(), {"photometric": 4}, "transparency mask of 8 unsigned bits.*magick"),
        (scene(), {"photometric": 32803}, "raw photo"),
        (scene(), {"tags": {50706: (1,)}}, "raw photo of a camera .DNG.*magick"),
        (scene(), {"tags": {254: (1,), 330: (8,)}}, "raw photo of a camera, with a small preview"),
        (scene(), {"photometric": 32844}, "LogL"),
        (scene(), {"tags": {259: (34712,)}}, "compression JPEG 2000"),
        (scene(), {"tags": {259: (50002,)}}, "compression 50002"),
        (scene(), {"tags": {259: (50001,)}}, "compression WebP"),
        (scaled(scene(), 12), {"bits": 12, "tags": {259: (7,)}}, "gray of 12 unsigned bits, compression JPEG"),
        (scaled(color_scene(), 16), {"photometric": 8}, "Lab of 3 x 16"),
        (scaled(color_scene(), 16), {"photometric": 6}, "YCbCr of 3 x 16"),
        (color_scene(), {"photometric": 6, "tags": {530: (2, 2), 279: (9,) * 4}}, "YCbCr of 3 x 8"),
        (scaled(scene(), 16), {"photometric": 3, "tags": {320: (0,) * 3 * 65536}}, "palette of 16"),
        (color_scene(), {"photometric": 2, "tags": {258: (5, 6, 5)}}, "RGB of 5/6/5 unsigned bits"),
        (scene().astype(np.complex64), {}, "gray of 64 complex bits"),
        (color_scene(), {"tags": {338: (0, 0)}}, "gray of 3 x 8"),
        (
            np.concatenate([color_scene(), color_scene()[..., :1]], axis=-1),
            {"photometric": 5, "tags": {332: (2,)}},
            "CMYK",
        ),
        (scene().astype(np.float32) / 255 * 4, {}, "floating-point samples, 0 to 4, do not tell which value is white"),
        (scene().astype(np.float32) / 255 - 0.5, {}, "samples, -0.5 to 0.5, do not tell"),
        (scene().astype(np.float32) * 1e6, {}, "do not tell"),
        ((scene().astype(np.int16) % 512) * 8 - 1000, {}, "signed samples, -1000 to 1040, do not tell"),
    ],
)
def test_other_layouts_are_refused_by_name(samples, options, message):
    with pytest.raises(UserError, match=f"^page.tif: .*{message}"):
        open_image(tiff(samples, **options), name="page.tif")


def test_values_that_are_no_numbers_are_paper():
    page = scaled(scene(), 32, "f")
    page[0, :5] = np.nan
    page[0, 5:10] = np.inf
    assert_page(open_image(tiff(page)), scene())


def test_first_page_that_is_a_thumbnail(caplog, monkeypatch):
    """A reduced copy before the page is passed over; of several pages the first is read, with a warning."""
    monkeypatch.setattr(images, "_warned_about", set())
    small = directory(scene()[::2, ::2], None, 1, 8, tags={254: (1,)}, following=1000)
    for bits in (8, 12):
        page = directory(scaled(scene(), bits), bits, 1, 1000)
        data = (b"II*\0" + struct.pack("<I", 8) + small).ljust(1000, b"\0") + page
        assert_page(open_image(data), scene())
        assert not caplog.records
    several = directory(scaled(scene(), 12), 12, 1, 8, following=2000)
    data = (b"II*\0" + struct.pack("<I", 8) + several).ljust(2000, b"\0") + directory(scene(), None, 1, 2000)
    assert_page(open_image(data), scene())
    assert "has several pages" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_limits_and_damage():
    data = tiff(scaled(scene(), 12), 12)
    with pytest.raises(UserError, match="20 x 16 pixels, more than the limit of 100"):
        open_image(data, max_pixels=100)
    with pytest.raises(UserError, match="pixels"):
        open_image(tiff(scaled(scene(), 12), 12, tags={256: (60_000,), 257: (60_000,)}))
    with pytest.raises(UserError, match="the tiles of the TIFF file, 1000000000 x 16, are larger"):
        open_image(tiff(scaled(scene(), 12), 12, tile=(16, 16), tags={322: (10**9,)}))
    for cut in range(8, len(data), 7):
        with pytest.raises(UserError):
            open_image(data[:cut], name="page")
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for position in rng.integers(0, 250, 3):
            broken[position] = rng.integers(0, 256)
        try:
            assert open_image(bytes(broken), max_pixels=10**6).mode == "RGB"
        except UserError:
            pass
