"""Converts images of any mode to plain RGB: upright, with transparent parts white like paper, and nothing clipped.

Handles EXIF rotation, palettes, alpha channels, transparent colors, grayscale of any number of bits, CMYK and floating
point. `open_encoded` opens the bytes of a file; what Pillow reads wrong is decoded by `tiff.py` and `png.py`, and what
is no image is named by `file_kinds.py`. Color profiles and gamma are ignored: the samples are taken as sRGB.

A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy, PIL and
neighbors that are copied, too.
"""

import io

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import PIL.TiffImagePlugin

from alignvlm_jax.data.file_kinds import UnreadableImageError, identify, identify_undecodable, is_avif, is_heif, is_jxl
from alignvlm_jax.data.png import PNG_SIGNATURE, decode_png, is_png_read_by_pillow, without_metadata
from alignvlm_jax.data.samples import to_bytes
from alignvlm_jax.data.tiff import (
    TRANSPOSES,
    TiffPage,
    correct_loaded_page,
    decode_page,
    is_read_by_pillow,
    is_tiff,
    page_of_image,
    read_page,
)

# The formats of pages and photographs. HEIF, JXL and some builds of AVIF need a plugin. PIL also reads others,
# but EPS, for example, would run a PostScript interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "GIF", "WEBP", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
_PLUGIN_FORMATS = ("HEIF", "JXL")
_EXIF_ORIENTATION = 0x0112
_TIFF_PALETTE = 320

# Formats whose files may have an alpha channel of zeros without meaning it: it is left over from a padding byte.
_PADDED_FORMATS = ("BMP", "DIB", "ICO", "TGA")


def formats() -> list[str]:
    """Returns the formats that `PIL.Image.open` may try; a build of PIL may lack some of them."""
    PIL.Image.init()
    return [name for name in _FORMATS + _PLUGIN_FORMATS if name in PIL.Image.OPEN]


def open_encoded(data: bytes, max_pixels: int | None = None) -> PIL.Image.Image:
    """Opens the bytes of an image file, for `to_rgb`.

    Most images are not decoded yet when they are returned. What Pillow would read wrong is.

    Args:
      data: the encoded bytes.
      max_pixels: larger images are refused before they are decoded; by default the limit of PIL applies.

    Raises:
      UnreadableImageError: if the file is no image that is read, or is too large.
      Exception: if the file is damaged. Decoders raise various types.
    """
    kind = identify(data)
    if kind is not None and not _has_plugin(data):
        raise _refusal(*kind)
    if data.startswith(PNG_SIGNATURE):
        data = without_metadata(data)
    page = _tiff_page(data)
    if page is not None and not is_read_by_pillow(page):
        _check_size(page.size, max_pixels)
        return _decoded(decode_page(data, page), "TIFF", page.next_offset != 0)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=formats())
    except PIL.UnidentifiedImageError as error:
        kind = kind or identify_undecodable(data)
        if kind is None:
            raise
        raise _refusal(*kind) from error
    if page is not None and page.number:
        image.seek(page.number)
    _check_size(image.size, max_pixels)
    if image.format == "PNG" and not is_png_read_by_pillow(data):
        return _decoded(_rotated(decode_png(data), _orientation(image)), "PNG", image.is_animated)
    return image


def _refusal(what: str, next_step: str) -> UnreadableImageError:
    """Returns the error for a file that is no image or in no format that is read."""
    return UnreadableImageError(f"not an image in a format that can be read: {what}", next_step)


def _has_plugin(data: bytes) -> bool:
    """Returns whether PIL has a reader for a file of a format that needs a plugin."""
    PIL.Image.init()
    name = "HEIF" if is_heif(data) else "AVIF" if is_avif(data) else "JXL" if is_jxl(data) else None
    return name in PIL.Image.OPEN


def _tiff_page(data: bytes) -> TiffPage | None:
    """Returns the first page of a TIFF file, or None if it is another or a damaged file, which Pillow reports."""
    if not is_tiff(data):
        return None
    try:
        return read_page(data)
    except UnreadableImageError:
        raise
    except ValueError:
        return None


def _check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    """Refuses an image that is too large, before it is decoded."""
    pixels = size[0] * size[1]
    if max_pixels is not None and pixels > max_pixels:
        raise UnreadableImageError(
            f"{size[0]} x {size[1]} pixels, more than the limit of {max_pixels}", "Shrink it first."
        )
    # PIL warns above its own limit and raises above twice the limit.
    if PIL.Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * PIL.Image.MAX_IMAGE_PIXELS:
        raise PIL.Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels exceed the limit of PIL")


def _decoded(image: PIL.Image.Image, format_name: str, has_more: bool) -> PIL.Image.Image:
    """Returns an image with the attributes that an image opened by PIL has."""
    image.format, image.is_animated = format_name, has_more
    return image


def to_rgb(image: PIL.Image.Image, *, keep_gray: bool = False) -> PIL.Image.Image:
    """Converts an image in memory to upright RGB, with transparent parts white.

    Args:
      image: image of any mode.
      keep_gray: whether an image without colors stays in one channel (mode L), which is faster to resize.

    Raises:
      UnreadableImageError: if PIL has decoded a TIFF file wrong, and the file itself is no longer available.
    """
    image = _to_opaque(image)
    image = image if keep_gray and image.mode == "L" else image.convert("RGB")
    # The orientation and the transparency are applied, and must not be again.
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1", "transparency"):
        image.info.pop(name, None)
    return image


def _to_opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns the image upright and opaque, in mode RGB or L, as a new object."""
    image = _read_again(image)
    # An alpha channel of zeros in these formats is a padding byte.
    is_padded = image.format in _PADDED_FORMATS and image.mode == "RGBA" and image.getextrema()[3] == (0, 0)
    image = _upright(image)
    if is_padded or (image.mode == "RGB" and "transparency" not in image.info):
        return image.convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip at 255
        return PIL.Image.fromarray(_with_transparent_value(to_bytes(np.asarray(image)), image))
    if image.mode == "1":
        gray = image.convert("L")
        return (
            PIL.Image.fromarray(_with_transparent_value(np.array(gray), gray)) if "transparency" in image.info else gray
        )
    # Lower-case "a": premultiplied alpha (La, RGBa). A palette or RGB image may name one transparent color.
    if "A" in image.mode.replace("LAB", "") or "a" in image.mode or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("L" if image.mode == "L" else "RGB")


def _with_transparent_value(pixels: np.ndarray, image: PIL.Image.Image) -> np.ndarray:
    """Returns the bytes of a grayscale image, with white where the image has its transparent value."""
    if isinstance(image.info.get("transparency"), int):
        pixels[np.asarray(image) == image.info["transparency"]] = 255
    return pixels


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Applies the EXIF orientation."""
    image.load()  # PIL rotates TIFF files itself while it decodes them.
    return _rotated(image, _orientation(image))


def _orientation(image: PIL.Image.Image) -> int | None:
    """Returns the EXIF orientation, or None if there is none or it cannot be read."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # An intact image with damaged EXIF data: ignore the orientation.
        return None


def _rotated(image: PIL.Image.Image, orientation: int | None) -> PIL.Image.Image:
    """Returns the image as a viewer shows it."""
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image


def _read_again(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns the image, decoded by `tiff.py` or `png.py` if PIL has opened a file that it reads wrong."""
    if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):
        page = page_of_image(image)
        if is_read_by_pillow(page):
            return _with_palette(image)
        data = _file_of(image)
        if data is not None:
            return decode_page(data, read_page(data, image.tell()))
        return correct_loaded_page(image, page)
    if isinstance(image, PIL.PngImagePlugin.PngImageFile) and image.tile and _needs_depth(image):
        data = _file_of(image)
        if data is not None:
            return open_encoded(data)
    return image


def _needs_depth(image: PIL.Image.Image) -> bool:
    """Returns whether a PNG file, not decoded yet, may be one that PIL reads wrong."""
    return str(image.tile[0][3]) == "RGB;16B" or (
        "transparency" in image.info and image.mode in ("1", "L", "I;16", "I")
    )


def _file_of(image: PIL.Image.Image) -> bytes | None:
    """Returns the bytes of the file of an image that PIL has opened, or None if it has closed the file."""
    file = getattr(image, "fp", None)
    try:
        position = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(position)
    except (AttributeError, OSError, ValueError):  # a closed file, or a stream that cannot be read twice
        return None
    return data


def _with_palette(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns a TIFF image with its palette corrected, if it has 8-bit values where 16 bits are due."""
    if image.mode not in ("P", "PA"):
        return image
    values = np.asarray(image.tag_v2.get(_TIFF_PALETTE, (256,)))
    if values.max() > 255:
        return image
    image = image.copy()
    image.putpalette(values.astype(np.uint8).reshape(3, -1).T.tobytes())
    return image
