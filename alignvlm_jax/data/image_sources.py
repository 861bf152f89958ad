"""Opens images in every form in which users have them.

    path                "page.png", pathlib.Path("page.png"), "gs://bucket/page.png"
    path of a PDF       "report.pdf" (all pages up to a limit), "report.pdf#page=3"
    bytes               of an image file or of a PDF
    PIL image           of any mode
    numpy array         uint8 or bool, [height, width] or [height, width, channels] with 1, 3 or 4 channels
    data URL            "data:image/png;base64,..."
    http(s) URL         only if the caller allows it

A URL is off by default: a program that reads what others send must not fetch addresses that they choose.
"""

import os

import numpy as np
import PIL.Image

from alignvlm_jax.data.data_urls import decode_data_url
from alignvlm_jax.data.images import DEFAULT_MAX_PAGES, DEFAULT_MAX_PIXELS, open_image, open_pages, to_rgb
from alignvlm_jax.errors import TemporaryError, UserError

ImageSource = str | os.PathLike | bytes | PIL.Image.Image | np.ndarray

MAX_DOWNLOAD = 64 * 2**20
_TIMEOUT = 30.0  # seconds without a byte
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def open_images(
    source: ImageSource,
    *,
    allow_urls: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_pages: int = DEFAULT_MAX_PAGES,
    keep_gray: bool = False,
) -> list[PIL.Image.Image]:
    """Returns the images of a source: one, or one per page of a PDF.

    Args:
      source: see the module docstring.
      allow_urls: whether http(s) URLs are fetched.
      max_pixels: larger images are refused before they are decoded.
      max_pages: largest number of pages of a PDF; a line in the log says so if it has more.
      keep_gray: whether an image without colors stays in one channel (mode L), which is faster to resize.

    Raises:
      UserError: if the source is of another type, or cannot be read.
    """
    source, name = _resolve(source, allow_urls)
    if isinstance(source, PIL.Image.Image):
        return [to_rgb(source, keep_gray=keep_gray)]
    return open_pages(source, name=name, max_pixels=max_pixels, max_pages=max_pages, keep_gray=keep_gray)


def open_single_image(source: ImageSource, *, keep_gray: bool = False) -> PIL.Image.Image:
    """Returns the image of a source that has only one.

    Args:
      source: see the module docstring.
      keep_gray: see `open_images`.

    Raises:
      UserError: as `open_images`, or if the source is a PDF of several pages.
    """
    source, name = _resolve(source, allow_urls=False)
    if isinstance(source, PIL.Image.Image):
        return to_rgb(source, keep_gray=keep_gray)
    return open_image(source, name=name, keep_gray=keep_gray)


def _resolve(source: ImageSource, allow_urls: bool) -> tuple[str | os.PathLike | bytes | PIL.Image.Image, str | None]:
    """Returns a source as a path, bytes or PIL image, and its name in error messages, if it needs one."""
    if isinstance(source, np.ndarray):
        return _from_array(source), None
    if isinstance(source, str):
        start = source[:8].lower()
        if start.startswith("data:"):
            return decode_data_url(source), "the image in the data URL"
        if allow_urls and start.startswith(("http://", "https://")):
            return _fetch(source), source
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview | PIL.Image.Image):
        raise UserError(
            f"an image of type {type(source).__name__} cannot be opened. Give a path, bytes, a PIL image, a numpy "
            "array or a data URL"
        )
    return source, None


def _from_array(pixels: np.ndarray) -> PIL.Image.Image:
    """Returns the image of an array."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.ndim not in (2, 3) or channels not in _CHANNELS or not pixels.size:
        raise UserError(
            f"an array of shape {list(pixels.shape)} is not an image. Give [height, width], or [height, width, "
            "channels] with 1, 3 or 4 channels"
        )
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        raise UserError(
            f"an array of type {pixels.dtype} does not tell which value is white. Scale it to 0 (black) ... 255 "
            "(white), and convert it with .astype(numpy.uint8)"
        )
    return PIL.Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels, _CHANNELS[channels])


def _fetch(url: str) -> bytes:
    """Returns the content of a URL, at most `MAX_DOWNLOAD` bytes."""
    shown = url if len(url) <= 120 else f"{url[:120]}..."
    content = bytearray()
    import httpx  # takes 0.1 s, which only URLs need

    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT) as response:
            response.raise_for_status()
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MAX_DOWNLOAD:
                    raise UserError(f"{shown}: more than {MAX_DOWNLOAD // 2**20} MiB. Download and shrink it first")
    except httpx.HTTPStatusError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        raise UserError(f"{shown}: the server answers {status}. Open it in a browser to see why") from error
    except httpx.InvalidURL as error:
        raise UserError(f"{shown}: not a valid URL ({error})") from error
    except httpx.HTTPError as error:
        raise TemporaryError(f"{shown}: cannot be fetched ({error or type(error).__name__}). Try again") from error
    return bytes(content)
