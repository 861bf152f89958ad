"""Opens PNG files whatever metadata they carry, and decodes the few layouts that Pillow reads wrong.

- Pillow refuses a file whose color profile or text unpacks to more than a mebibyte, or whose metadata is damaged. Only
  the chunks that shape the pixels are therefore passed on. The limits of Pillow stay as they are: they are global, and
  belong to the user's process.
- Pillow compares the transparent color of a grayscale PNG of 1, 2, 4 or 16 bits, and of a color PNG of 16 bits, with
  samples of another scale. Here, it is compared in numpy.
- A color PNG of 16 bits with values of 12 or fewer bits would be black; see `samples.py`.

A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy and PIL.
Source: Portable Network Graphics (PNG) Specification, Third Edition.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image

from alignvlm_jax.data.samples import to_bytes

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Chunks that shape the image: its pixels, transparency and orientation, and the frames of an animation.
_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
# Texts in which the orientation may be stated.
_EXIF_TEXT = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"exif\0")
_XMP_TEXT = b"XML:com.adobe.xmp\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([1-8])')

_LARGEST_TEXT = 1 << 20  # Pillow's limit
_LARGEST_XMP = 64 << 20  # bytes of unpacked XMP that are searched for the orientation

_GRAY, _COLOR = 0, 2  # color types in IHDR


def without_metadata(data: bytes) -> bytes:
    """Returns a PNG file without the chunks that do not shape the image.

    A damaged or truncated file stays so.
    """
    parts, position, is_changed = [PNG_SIGNATURE], len(PNG_SIGNATURE), False
    while position < len(data):
        kind, end = data[position + 4 : position + 8], _chunk_end(data, position)
        if end > len(data) or not kind.isalpha():
            parts.append(data[position:])  # truncated or damaged, which Pillow reports
            break
        chunk = data[position:end]
        if kind not in _KEPT and kind[:1].islower():
            chunk = _orientation_text(chunk)
            is_changed = True
        parts.append(chunk)
        position = end
    return b"".join(parts) if is_changed else data


def _chunk_end(data: bytes, position: int) -> int:
    """Returns the position after the chunk, which has a length, a type, contents and a checksum."""
    return position + 12 + int.from_bytes(data[position : position + 4], "big")


def _orientation_text(chunk: bytes) -> bytes:
    """Returns a chunk of metadata if it may state the orientation, in a short form, and nothing otherwise."""
    kind, text = chunk[4:8], chunk[8:-4]
    if kind in (b"tEXt", b"zTXt") and text.startswith(_EXIF_TEXT):
        is_short = kind == b"tEXt" or len(_unpacked(text.split(b"\0", 1)[1][1:], _LARGEST_TEXT + 1)) <= _LARGEST_TEXT
        return chunk if is_short else b""
    if kind != b"iTXt" or not text.startswith(_XMP_TEXT):
        return b""
    fields = text[len(_XMP_TEXT) :]
    # A flag for compression, the method, then language and translated keyword, each up to a zero byte.
    contents = fields[2:].split(b"\0", 2)[-1]
    found = _XMP_ORIENTATION.search(_unpacked(contents, _LARGEST_XMP) if fields[:1] == b"\1" else contents)
    return _chunk(b"iTXt", _XMP_TEXT + b"\0\0\0\0" + found.group()) if found else b""


def _unpacked(data: bytes, limit: int) -> bytes:
    """Returns at most `limit` bytes of compressed text, or none if it is damaged."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return b""


def _chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def layout(data: bytes) -> tuple[int, int]:
    """Returns the bits per sample and the color type of a PNG file."""
    return (data[24], data[25]) if len(data) > 25 else (0, 0)


def transparent_color(data: bytes) -> tuple[int, ...] | None:
    """Returns the samples of the color that is transparent in a grayscale or color PNG file, or None."""
    bits, color_type = layout(data)
    samples = {_GRAY: 1, _COLOR: 3}.get(color_type)
    if samples is None:
        return None
    for kind, contents in _chunks(data):
        if kind == b"tRNS" and len(contents) >= 2 * samples:
            # Only the lowest bits of a value count.
            return tuple(value & (2**bits - 1) for value in struct.unpack_from(f">{samples}H", contents))
        if kind == b"IDAT":
            break
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the types and contents of the chunks."""
    position = len(PNG_SIGNATURE)
    while (end := _chunk_end(data, position)) <= len(data) and position + 12 <= len(data):
        yield data[position + 4 : position + 8], data[position + 8 : end - 4]
        position = end


def is_png_read_by_pillow(data: bytes) -> bool:
    """Returns whether Pillow reads the transparency and the range of a PNG file correctly."""
    bits, color_type = layout(data)
    if color_type == _COLOR and bits == 16:
        return False
    return color_type != _GRAY or bits == 8 or transparent_color(data) is None


def decode_png(data: bytes) -> PIL.Image.Image:
    """Decodes a file that Pillow would read wrong as an opaque image of mode L or RGB, before its orientation."""
    bits, color_type = layout(data)
    transparent = transparent_color(data)
    if color_type == _COLOR:
        samples = _sixteen_bit_colors(data)
    else:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            # Pillow scales samples of 1, 2 and 4 bits to bytes, or to booleans.
            scale = 1 if bits in (1, 16) else 255 // (2**bits - 1)
            samples = np.asarray(image).astype(np.uint16)[..., None] // scale
    pixels = to_bytes(samples, bits)
    if transparent is not None:
        pixels[(samples == np.asarray(transparent, samples.dtype)).all(axis=-1)] = 255
    return PIL.Image.fromarray(pixels[..., 0] if color_type == _GRAY else pixels)


def _sixteen_bit_colors(data: bytes) -> np.ndarray:
    """Returns the samples of a color PNG of 16 bits, uint16 [height, width, 3]."""
    halves = []
    # Pillow has no mode for 16-bit colors and reads their high bytes, or the low ones if told that they come first.
    for raw_mode in ("RGB;16B", "RGB;16L"):
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            decoder, extents, offset, _ = image.tile[0]
            image.tile = [(decoder, extents, offset, raw_mode)]
            halves.append(np.asarray(image).astype(np.uint16))
    return halves[0] << 8 | halves[1]
