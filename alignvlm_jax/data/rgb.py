"""Converts images of any mode to plain RGB: upright, with transparent parts white like paper, and nothing clipped.

Handles EXIF rotation, palettes, alpha channels, transparent colors, grayscale of 1, 8 or 16 bits, CMYK and floating
point. A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy and
PIL.
"""

import numpy as np
import PIL.Image

# The formats of pages and photographs. PIL also reads others, but EPS, for example, would run a PostScript
# interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "GIF", "WEBP", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
_EXIF_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def formats() -> list[str]:
    """Returns the formats that `PIL.Image.open` may try; a build of PIL may lack some of them."""
    PIL.Image.init()
    return [name for name in _FORMATS if name in PIL.Image.OPEN]


def to_rgb(image: PIL.Image.Image, *, keep_gray: bool = False) -> PIL.Image.Image:
    """Converts an image in memory to upright RGB, with transparent parts white.

    Args:
      image: image of any mode.
      keep_gray: whether an image without colors stays in one channel (mode L), which is faster to resize.
    """
    image = _to_opaque(image)
    return image if keep_gray and image.mode == "L" else image.convert("RGB")


def _to_opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns the image upright and opaque, in mode RGB or L."""
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit values, which convert() would clip at 255
        return _from_gray(np.asarray(image).astype(np.float64) / 257.0)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64))
        # Floating-point images have the range 0 ... 1 or 0 ... 255; the largest value shows which.
        return _from_gray(values * 255.0 if values.max() <= 1.0 else values)
    # Lower-case "a": premultiplied alpha (La, RGBa). A palette or RGB image may name one transparent color.
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Applies the EXIF orientation."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # An intact image with damaged EXIF data: ignore the orientation.
        return image
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def _from_gray(values: np.ndarray) -> PIL.Image.Image:
    """Returns an 8-bit grayscale image of values in 0 ... 255."""
    return PIL.Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
