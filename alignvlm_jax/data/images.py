"""Open a picture as documents really come, as plain RGB.

Rotated by EXIF, with a palette, transparent (laid on white, like paper), grey of 1, 8 or 16 bits, CMYK, floating point;
of a multi-page TIFF the first page, of an animation the first frame, and a log says so. Whatever cannot be read is a
`UserError` that names the file, so that one bad file never ends a run.
"""

import contextlib
import io
import logging
import os
import pathlib
from collections.abc import Iterator

import PIL.Image

from alignvlm_jax.data.rgb import formats, to_rgb
from alignvlm_jax.errors import UserError

# An A4 page at 600 dots per inch has 35 million pixels. Decoded, this many take a quarter of a gigabyte.
DEFAULT_MAX_PIXELS = 80_000_000

_log = logging.getLogger(__name__)

__all__ = ["DEFAULT_MAX_PIXELS", "image_size", "open_image", "to_rgb"]

# Formats whose header says how the picture will lie once it is decoded, and what in the bytes may say otherwise: a PNG
# may carry its EXIF or XMP data behind the pixels, where only decoding finds them.
_SIZED_BY_HEADER = {"JPEG": (), "MPO": (), "WEBP": (), "PNG": (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")}
_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # orientations that swap width and height


def open_image(
    source: str | os.PathLike | bytes,
    *,
    name: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    keep_grey: bool = False,
) -> PIL.Image.Image:
    """Read a file, or the bytes of one, as an upright RGB image.

    Args:
      source: a path, or the encoded bytes (PNG, JPEG, TIFF, GIF, WebP, ...).
      name: what to call the picture in errors; by default the path.
      max_pixels: refuse larger pictures before decoding them (a small file can claim a billion pixels).
      keep_grey: as for `to_rgb`.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), name or "image"
    else:
        name = name or os.fspath(source)
        data = _read(source, name)
    with _opened(data, name, max_pixels) as image:
        _tell_of_more_pages(image, name)
        image.load()
        return to_rgb(image, keep_grey=keep_grey)


def image_size(data: bytes, *, name: str = "image", max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `open_image` would return, where possible without decoding it.

    A picture that is damaged behind its header has a size all the same.

    Args:
      data: the encoded bytes.
      name, max_pixels: as for `open_image`.
    """
    with _opened(data, name, max_pixels) as image:
        if image.format in _SIZED_BY_HEADER and not any(mark in data for mark in _SIZED_BY_HEADER[image.format]):
            width, height = image.size
            return (height, width) if _orientation(image) in _LYING else (width, height)
    return open_image(data, name=name, max_pixels=max_pixels).size


@contextlib.contextmanager
def _opened(data: bytes, name: str, max_pixels: int) -> Iterator[PIL.Image.Image]:
    """The picture, its header read; what goes wrong, here or while it is in use, is a `UserError`."""
    if not data:
        raise UserError(f"{name}: the image file is empty")
    try:
        with PIL.Image.open(io.BytesIO(data), formats=formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{name}: {width} x {height} pixels, more than the limit of {max_pixels}")
            yield image
    except UserError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a format that can be read ({len(data)} bytes)") from error
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name}: too many pixels: {error}") from error
    except Exception as error:  # Decoders meet damage with every exception there is: struct.error, IndexError, ...
        raise UserError(f"{name}: the image cannot be read, it may be damaged ({error})") from error


_told_of: set[str] = set()


def _tell_of_more_pages(image: PIL.Image.Image, name: str) -> None:
    """Logs, once for pages and once for frames, that there is more in the file than is read."""
    if image.format == "TIFF":
        what, more = "pages", image.tag_v2.next != 0  # where the next page begins; counting them would visit them all
    else:
        what, more = "frames", getattr(image, "is_animated", False)
    if more and what not in _told_of:
        _told_of.add(what)
        _log.warning("%s has several %s: of such files only the first is read (this is said once)", name, what)


def _orientation(image: PIL.Image.Image) -> int | None:
    if image.format == "PNG":
        return None  # it was looked for
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # as in `to_rgb`: damaged EXIF beside a sound picture
        return None


def _read(path: str | os.PathLike, name: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such image file") from error
    except IsADirectoryError as error:
        raise UserError(f"{name}: is a folder, not an image file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path.
        raise UserError(f"{name}: the image file cannot be opened ({error})") from error
