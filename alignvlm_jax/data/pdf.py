"""Renders the pages of PDF files as images.

A page is rendered at 200 dots per inch, on white, with its forms and annotations. A page so small that this gives fewer
pixels than tiles show, such as a receipt, is rendered at a higher resolution; a poster at a lower one.

    report.pdf           all pages
    report.pdf#page=3    one page, counted from 1, as in the URL of a browser

PDFium does the work, in the package pypdfium2. It opens files of unknown origin in many browsers, but it unpacks every
stream that a page names. `_check_streams` and `_check_page` therefore refuse files that unpack to gigabytes before
PDFium sees the stream.
"""

import contextlib
import importlib
import io
import math
import os
import re
import threading
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import PIL.Image

from alignvlm_jax.data.file_kinds import identify
from alignvlm_jax.errors import UserError

_POINTS_PER_INCH = 72
_DOTS_PER_INCH = 200
# More than 9 tiles of 448 x 448 pixels show. A4 at 200 dots per inch has 3.9 million.
_MIN_PIXELS = 2_000_000
# A3 at 300 dots per inch. No tiling shows more.
_MAX_PIXELS = 18_000_000
_MAX_SIDE = 14_400  # points, the limit of the PDF standard
_MAX_RATIO = 200  # of the sides of a page

_PAGE = re.compile(r"(.+)#page=([^#/]*)", re.DOTALL)
_STREAM = re.compile(rb"stream\r?\n")
# A stream that is compressed twice may unpack to a million times its size.
_NESTED_FILTERS = re.compile(rb"/Filter\s*\[\s*/(?:Fl|FlateDecode|LZW|LZWDecode)\s*/(?:Fl|FlateDecode|LZW|LZWDecode)\b")
_DEFLATE_RATIO = 1032  # the highest that deflate can reach
_MAX_STREAM = 400_000_000  # bytes

_RESOLUTION = "pixels per point"  # key in the `info` of an image

# PDFium is not safe for threads.
_lock = threading.Lock()


def is_pdf(data: bytes) -> bool:
    """Returns whether a file is a PDF."""
    kind = identify(data)
    return kind is not None and kind[0] == "a PDF"


def split_page(path: str | os.PathLike) -> tuple[str, int | None]:
    """Returns the file and the page number of `FILE#page=N`; the number is None if the path names no page.

    Raises:
      UserError: if the number is not 1 or more.
    """
    path = os.fspath(path)
    match = _PAGE.fullmatch(path)
    if match is None or os.path.exists(path):
        return path, None
    if not match[2].isdecimal() or int(match[2]) < 1:
        raise UserError(f"{path}: expected the number of a page, from 1, after #page=, got {match[2]!r}")
    return match[1], int(match[2])


def render_page(data: bytes, number: int | None, *, name: str, max_pixels: int) -> PIL.Image.Image:
    """Returns one page of a PDF in RGB.

    Args:
      data: content of the file.
      number: number of the page, from 1. None stands for the only page of the file.
      name: name of the file in error messages.
      max_pixels: largest number of pixels of the page, and of an image on it.

    Raises:
      UserError: if the file cannot be read, does not have the page, or has several and `number` is None.
    """
    with _open(data, name) as document:
        count = len(document)
        if number is None and count > 1:
            raise UserError(f"{name}: a PDF of {count} pages where one image is expected. Name a page: {name}#page=1")
        if number is not None and number > count:
            pages = "1 page" if count == 1 else f"{count} pages"
            raise UserError(f"{name}: has {pages}, so there is no page {number}. Name one from 1 to {count}")
        return _render(document, number or 1, name, max_pixels)


def render_pages(data: bytes, *, name: str, max_pixels: int, max_pages: int) -> tuple[list[PIL.Image.Image], int]:
    """Returns the first pages of a PDF, as `render_page` does, and the number of all its pages.

    Args:
      data: content of the file.
      name: name of the file in error messages.
      max_pixels: see `render_page`.
      max_pages: largest number of pages that are returned.
    """
    with _open(data, name) as document:
        count = len(document)
        return [_render(document, 1 + i, name, max_pixels) for i in range(min(count, max_pages))], count


def _render(document: Any, number: int, name: str, max_pixels: int) -> PIL.Image.Image:
    where, pdfium = f"{name}, page {number}", _pdfium()
    try:
        page = document[number - 1]
        width, height = page.get_size()
        _check_page(page, (width, height), max_pixels, where)
        scale = _scale(width, height, max_pixels)
        image = page.render(scale=scale, rev_byteorder=True).to_pil().convert("RGB")
    except pdfium.PdfiumError as error:
        raise UserError(f"{where}: cannot be read, the PDF may be damaged ({error})") from error
    image.info[_RESOLUTION] = scale
    return image


def to_png(page: PIL.Image.Image) -> bytes:
    """Returns a rendered page as a PNG file, which is smaller if the page has no colors."""
    red, green, blue = page.split()
    is_gray = red.tobytes() == green.tobytes() == blue.tobytes()
    file = io.BytesIO()
    (red if is_gray else page).save(file, "PNG", dpi=(pixels_per_point(page) * _POINTS_PER_INCH,) * 2)
    return file.getvalue()


def pixels_per_point(image: PIL.Image.Image) -> float:
    """Returns the resolution at which an image was rendered from a PDF, in pixels per point; 1 for other images."""
    return image.info.get(_RESOLUTION, 1.0)


def _scale(width: float, height: float, max_pixels: int) -> float:
    """Returns the number of pixels per point of a page of this size in points."""
    area = width * height
    smallest, largest = (math.sqrt(pixels / area) for pixels in (_MIN_PIXELS, min(_MAX_PIXELS, max_pixels)))
    # `render` rounds both sides up.
    return min(max(_DOTS_PER_INCH / _POINTS_PER_INCH, smallest), largest * 0.999)


@contextlib.contextmanager
def _open(data: bytes, name: str) -> Iterator[Any]:
    """Opens a PDF for use in this thread alone."""
    pdfium = _pdfium()
    _check_streams(data, name)
    with _lock:
        try:
            document = pdfium.PdfDocument(data)
        except pdfium.PdfiumError as error:
            raise UserError(f"{name}: {_why_closed(error, pdfium)}") from error
        with document:
            if not len(document):
                raise UserError(f"{name}: a PDF without pages. Save it again from the program that made it")
            with contextlib.suppress(pdfium.PdfiumError):
                document.init_forms()
            yield document


def _pdfium() -> ModuleType:
    # Loading the library takes time that only PDFs need.
    return importlib.import_module("pypdfium2")


def _why_closed(error: Exception, pdfium: ModuleType) -> str:
    """Returns why a PDF cannot be opened, and what to do."""
    if error.err_code == pdfium.raw.FPDF_ERR_PASSWORD:
        return "a PDF with a password. Remove it with `qpdf --decrypt --password=PASSWORD FILE page.pdf`"
    if error.err_code == pdfium.raw.FPDF_ERR_SECURITY:
        return "a PDF with an encryption that is not supported. Print it to a new PDF"
    return "a PDF that is damaged or has no pages. Copy or download it again, or repair it with `qpdf FILE page.pdf`"


def _check_page(page: Any, size: tuple[float, float], max_pixels: int, where: str) -> None:
    """Refuses a page of a size that no paper has, or with an image of too many pixels."""
    width, height = size
    if not (0 < min(size) and max(size) <= min(_MAX_SIDE, _MAX_RATIO * min(size))):
        inches = " x ".join(f"{side / _POINTS_PER_INCH:.4g}" for side in size)
        raise UserError(f"{where}: the page is {inches} inches, which is too large or too narrow. Crop or split it")
    raw = importlib.import_module("pypdfium2.raw")
    for image in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]):
        pixels = image.get_px_size()
        if math.prod(pixels) > max_pixels:
            raise UserError(
                f"{where}: has an image of {pixels[0]} x {pixels[1]} pixels, more than the limit of {max_pixels}. "
                "Shrink it first"
            )


def _check_streams(data: bytes, name: str) -> None:
    """Refuses a PDF with a stream that unpacks to more than `_MAX_STREAM` bytes."""
    bomb = UserError(
        f"{name}: a PDF that unpacks to more than {_MAX_STREAM // 10**6} MB, which no page needs. If it is not "
        "hostile, print it to a new PDF"
    )
    if _NESTED_FILTERS.search(data):
        raise bomb
    for match in _STREAM.finditer(data):
        start, end = match.end(), data.find(b"endstream", match.end())
        end = len(data) if end < 0 else end
        if (end - start) * _DEFLATE_RATIO > _MAX_STREAM and _unpacks_beyond(memoryview(data)[start:end], _MAX_STREAM):
            raise bomb


def _unpacks_beyond(data: memoryview, limit: int) -> bool:
    """Returns whether data are compressed by deflate, and longer than the limit without compression."""
    unpacker, size = zlib.decompressobj(), 0
    with contextlib.suppress(zlib.error):  # another filter
        while data and not unpacker.eof:
            size += len(unpacker.decompress(data, 1 << 22))
            data = unpacker.unconsumed_tail
            if size > limit:
                return True
    return False
