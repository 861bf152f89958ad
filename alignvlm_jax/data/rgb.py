"""Any picture in memory as plain RGB: upright, transparent parts white like paper, nothing clipped.

Rotated by EXIF, with a palette, an alpha channel or a transparent colour, grey of 1, 8 or 16 bits, CMYK, floating
point. A copy of this file travels with every exported PyTorch model (`interop/pytorch`): numpy and PIL only.
"""

import numpy as np
import PIL.Image

# What pages and photographs come in. Not every format PIL knows: EPS, for one, would run a PostScript interpreter.
_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "GIF", "WEBP", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
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


def formats() -> list[str]:
    """What `PIL.Image.open` may take a file for; a build of PIL need not have all of them."""
    PIL.Image.init()
    return [name for name in _FORMATS if name in PIL.Image.OPEN]


def to_rgb(image: PIL.Image.Image, *, keep_grey: bool = False) -> PIL.Image.Image:
    """An image already in memory, upright and in RGB, transparent parts white.

    Args:
      image: of any mode.
      keep_grey: leave a picture without colours in one channel (mode L), which is faster to resize.
    """
    image = _plain(image)
    return image if keep_grey and image.mode == "L" else image.convert("RGB")


def _plain(image: PIL.Image.Image) -> PIL.Image.Image:
    """Upright, opaque, in mode RGB or L."""
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
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Damaged EXIF beside a sound picture: take the picture as it lies.
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _from_grey(values: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
