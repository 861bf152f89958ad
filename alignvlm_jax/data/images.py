"""Opens the image files of real documents as plain RGB.

Handles EXIF rotation, palettes, transparency (on white, like paper), grayscale of any number of bits, CMYK and floating
point; see `rgb.py`. Renders the pages of a PDF; see `pdf.py`. Only the first page of a multi-page TIFF and the first
frame of an animation are read, with a warning in the log. A file that cannot be read raises a `UserError` that says
what the file is, so callers can skip one bad file.
"""

import contextlib
import importlib
import logging
import os
import pathlib
from collections.abc import Iterator

import PIL.Image
import PIL.TiffImagePlugin

from alignvlm_jax.data import pdf
from alignvlm_jax.data.file_kinds import UnreadableImageError, identify_path, identify_undecodable, is_avif, is_heif
from alignvlm_jax.data.rgb import open_encoded, to_rgb
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.errors import translated_errors

# An A4 page at 600 dots per inch has 35 million pixels. The limit is a quarter of a gigabyte when decoded to RGB.
DEFAULT_MAX_PIXELS = 80_000_000
DEFAULT_MAX_PAGES = 16

_log = logging.getLogger(__name__)

__all__ = ["DEFAULT_MAX_PAGES", "DEFAULT_MAX_PIXELS", "image_size", "open_image", "open_pages", "to_rgb"]

# Formats whose header states the final size of the image, with the byte sequences that mark exceptions: a PNG may have
# EXIF or XMP data after its pixels, where only decoding finds them.
_SIZED_BY_HEADER = {"JPEG": (), "MPO": (), "WEBP": (), "PNG": (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")}
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def open_image(
    source: str | os.PathLike | bytes,
    *,
    name: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    keep_gray: bool = False,
) -> PIL.Image.Image:
    """Reads an image file, or the bytes of one, as an upright RGB image.

    Args:
      source: path, or the encoded bytes (PNG, JPEG, TIFF, GIF, WebP, ...). A PDF must have one page, or the path must
        name one (`FILE#page=3`).
      name: name of the image in error messages; by default the path.
      max_pixels: larger images are refused before they are decoded (a small file can claim a billion pixels).
      keep_gray: see `to_rgb`.

    Raises:
      UserError: if the image cannot be read or is too large.
    """
    data, page, name = _load(source, name)
    if pdf.is_pdf(data):
        return pdf.render_page(data, page, name=name, max_pixels=max_pixels)
    with _open_checked(data, name, max_pixels) as image:
        _warn_about_more_pages(image, name)
        image.load()
        return to_rgb(image, keep_gray=keep_gray)


def open_pages(
    source: str | os.PathLike | bytes,
    *,
    name: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_pages: int = DEFAULT_MAX_PAGES,
    keep_gray: bool = False,
) -> list[PIL.Image.Image]:
    """Reads an image file as `open_image` does, or all pages of a PDF.

    Args:
      source: see `open_image`; a PDF may have several pages.
      name: see `open_image`.
      max_pixels: see `open_image`.
      max_pages: largest number of pages; a line in the log says so if there are more.
      keep_gray: see `open_image`.
    """
    data, page, name = _load(source, name)
    if page is not None or not pdf.is_pdf(data):
        return [open_image(source, name=name, max_pixels=max_pixels, keep_gray=keep_gray)]
    pages, count = pdf.render_pages(data, name=name, max_pixels=max_pixels, max_pages=max_pages)
    if count > len(pages):
        _log.warning(
            "%s has %d pages: only the first %d are read. Name another one with %s#page=%d",
            name,
            count,
            max_pages,
            name,
            max_pages + 1,
        )
    return pages


def image_size(data: bytes, *, name: str = "image", max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Returns the width and height of the image that `open_image` would return, without decoding it where possible.

    An image that is damaged after its header still has a size.

    Args:
      data: the encoded bytes.
      name: see `open_image`.
      max_pixels: see `open_image`.
    """
    if pdf.is_pdf(data):
        return open_image(data, name=name, max_pixels=max_pixels).size
    with _open_checked(data, name, max_pixels) as image:
        if image.format in _SIZED_BY_HEADER and not any(mark in data for mark in _SIZED_BY_HEADER[image.format]):
            width, height = image.size
            return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)
    # The header is unknown or ambiguous, so decode the image to find out.
    return open_image(data, name=name, max_pixels=max_pixels).size


@contextlib.contextmanager
def _open_checked(data: bytes, name: str, max_pixels: int) -> Iterator[PIL.Image.Image]:
    """Opens an image and reads its header; errors, here or while the image is in use, become a `UserError`."""
    if not data:
        raise UserError(f"{name}: the image file is empty")
    _register_plugin(data)
    try:
        with open_encoded(data, max_pixels) as image:
            yield image
    except UserError:
        raise
    except UnreadableImageError as error:
        raise UserError(f"{name}: {error}") from error
    except PIL.UnidentifiedImageError as error:
        start = data[:8].hex(" ")
        raise UserError(
            f"{name}: not an image in a format that can be read ({len(data)} bytes, which begin {start}). Find out "
            "what it is with `file`, and convert it to PNG."
        ) from error
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name}: too many pixels: {error}") from error
    except Exception as error:  # Decoders raise any exception on damaged data: struct.error, IndexError, ...
        kind = identify_undecodable(data)
        if kind is not None:
            raise UserError(f"{name}: not an image in a format that can be read: {'. '.join(kind)}") from error
        raise UserError(f"{name}: the image cannot be read, it may be damaged ({error})") from error


def _register_plugin(data: bytes) -> None:
    """Registers the PIL plugin for a HEIC or AVIF file, if one is installed and PIL lacks a reader."""
    PIL.Image.init()
    if is_heif(data) and "HEIF" not in PIL.Image.OPEN:
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    elif is_avif(data) and "AVIF" not in PIL.Image.OPEN:
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_avif")  # registers itself


_warned_about: set[str] = set()


def _warn_about_more_pages(image: PIL.Image.Image, name: str) -> None:
    """Warns that only the first page or frame of a file is read; once for pages and once for frames."""
    if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):
        # `next` is the offset of the next page, or 0. Counting the pages would visit all of them.
        what, more = "pages", image.tag_v2.next != 0
    elif image.format == "TIFF":
        what, more = "pages", image.is_animated
    else:
        what, more = "frames", getattr(image, "is_animated", False)
    if more and what not in _warned_about:
        _warned_about.add(what)
        _log.warning("%s has several %s: only the first is read, as in all such files (logged once)", name, what)


def _orientation(image: PIL.Image.Image) -> int | None:
    """Returns the EXIF orientation, or None if there is none or it cannot be read."""
    if image.format == "PNG":
        return None  # `image_size` has already ruled out EXIF data
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # an intact image with damaged EXIF data, as in `to_rgb`
        return None


def _load(source: str | os.PathLike | bytes, name: str | None) -> tuple[bytes, int | None, str]:
    """Returns the bytes of an image, the page that its path names, and its name in error messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), None, name or "image"
    path, page = pdf.split_page(source)
    data = _read(path, name or path)
    if page is not None and not pdf.is_pdf(data):
        raise UserError(f"{name or path}: not a PDF, so it has no page {page}. Leave out #page={page}")
    return data, page, name or path


def _read(path: str | os.PathLike, name: str) -> bytes:
    """Returns the bytes of an image file."""
    kind = identify_path(name)
    if kind is not None:
        shortened = name if len(name) <= 80 else f"{name[:60]}..."
        raise UserError(f"{shortened}: {'. '.join(kind)}")
    # Outside of a shell, nobody has expanded `~`.
    path = pathlib.Path(path) if os.path.exists(path) else open_location(path)
    try:
        with translated_errors(str(path)):
            return path.read_bytes()
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise UserError(
                f"{name}: a link to {os.readlink(path)!r}, which does not exist. Restore the file that it points to."
            ) from error
        raise UserError(f"{name}: no such image file") from error
    except IsADirectoryError as error:
        raise UserError(f"{name}: is a folder, not an image file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path.
        raise UserError(f"{name}: the image file cannot be opened ({error})") from error
