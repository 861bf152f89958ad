"""Open a picture as documents really come, as plain RGB.

Rotated by EXIF, with a palette, transparent (laid on white, like paper), grey of 1, 8 or 16 bits, CMYK, floating point;
of a multi-page TIFF the first page, of an animation the first frame. Whatever cannot be read is a `UserError` that
names the file, so that one bad file never ends a run.
"""

import io
import os
import pathlib

import numpy as np
import PIL.Image

from alignvlm_jax.errors import UserError

# An A4 page at 600 dots per inch has 35 million pixels. Decoded, this many take a quarter of a gigabyte.
DEFAULT_MAX_PIXELS = 80_000_000

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def open_image(
    source: str | os.PathLike | bytes, *, name: str | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> PIL.Image.Image:
    """Read a file, or the bytes of one, as an upright RGB image.

    Args:
      source: a path, or the encoded bytes (PNG, JPEG, TIFF, GIF, WebP, ...).
      name: what to call the picture in errors; by default the path.
      max_pixels: refuse larger pictures before decoding them (a small file can claim a billion pixels).
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), name or "image"
    else:
        name = name or os.fspath(source)
        data = _read(source, name)
    if not data:
        raise UserError(f"{name}: the image file is empty")
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{name}: {width} x {height} pixels, more than the limit of {max_pixels}")
            image.load()
            return to_rgb(image)
    except UserError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in a format that can be read ({len(data)} bytes)") from error
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name}: too many pixels: {error}") from error
    except Exception as error:  # Decoders meet damage with every exception there is: struct.error, IndexError, ...
        raise UserError(f"{name}: the image cannot be read, it may be damaged ({error})") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image already in memory, upright and in RGB, transparent parts white."""
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16 bits a pixel, which convert() would clip at 255.
        return _from_grey(np.asarray(image).astype(np.float64) / 257.0)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64))
        return _from_grey(values * 255.0 if values.max() <= 1.0 else values)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _read(path: str | os.PathLike, name: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such image file") from error
    except IsADirectoryError as error:
        raise UserError(f"{name}: is a folder, not an image file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path.
        raise UserError(f"{name}: the image file cannot be opened ({error})") from error


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Damaged EXIF beside a sound picture: take the picture as it lies.
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _from_grey(values: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
