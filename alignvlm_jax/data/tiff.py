"""Decodes the TIFF layouts that Pillow reads wrong or not at all.

TIFF is a family of layouts: the photometric interpretation says what a sample means, and each sample may have any
number of bits. Pillow knows a list of layouts, and hands several out as they are: 12 bits as if they were 16,
white-is-zero as if it were black-is-zero, signed as if it were unsigned. `is_read_by_pillow` names the layouts that it
reads correctly; `decode_page` reads the others, or refuses them by name:

    read here      gray, RGB and CMYK, with or without alpha; 1 ... 64 bits, unsigned, signed or floating point; chunky
                   or planar; strips or tiles; uncompressed, PackBits, LZW, deflate, LZMA or Zstandard, with or without
                   predictor; TIFF and BigTIFF of either byte order
    refused        raw photos (DNG), color filter arrays, LogLuv, 16-bit Lab, YCbCr and palettes, samples of unequal
                   size, JPEG of 12 bits, other compressions

The compressed bytes are decoded by libtiff, through Pillow. For this, a new directory is appended to the file, which
describes every row as plain bytes. What the bytes mean is decided here, in numpy.

A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy and PIL.
Source of the tags: TIFF 6.0, the BigTIFF proposal, and Adobe's technical notes 1 to 3.
"""

import dataclasses
import io
import struct

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin

from alignvlm_jax.data.file_kinds import UnreadableImageError, convert_with
from alignvlm_jax.data.samples import to_bytes

_SUBFILE, _OLD_SUBFILE = 254, 255
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS = 273, 274, 277, 278, 279
_MAX_VALUE, _PLANAR, _PREDICTOR, _PALETTE = 281, 284, 317, 320
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325
_SUB_DIRECTORIES, _INK_SET, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 330, 332, 338, 339, 530
_DNG_VERSION = 50706
_WANTED = frozenset(
    (_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIP_OFFSETS)
    + (_ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS, _MAX_VALUE, _PLANAR, _PREDICTOR, _PALETTE)
    + (_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _SUB_DIRECTORIES, _INK_SET, _EXTRA_SAMPLES)
    + (_SAMPLE_FORMAT, _SUBSAMPLING, _DNG_VERSION)
)
_FIELD_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}

# Photometric interpretations.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INDEXED, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COLORS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}
_PHOTOMETRIC_NAMES = {3: "palette", 4: "transparency mask", 6: "YCbCr", 8: "Lab", 9: "ICC Lab", 10: "ITU Lab"} | {
    32803: "color filter array of a raw photo",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw photo",
    51177: "depth map",
}
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4
_FORMAT_NAMES = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "unsigned", 5: "complex integer", 6: "complex"}

# Compressions whose result is plain rows of bytes.
_PLAIN_COMPRESSIONS = {
    1: "none",
    5: "LZW",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "zstd",
}
_FAX_COMPRESSIONS = (2, 3, 4, 32771)
_JPEG_COMPRESSIONS = (6, 7)
_COMPRESSION_NAMES = {
    34712: "JPEG 2000",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    32809: "ThunderScan",
} | {
    **{32766: "NeXT", 34676: "SGILog", 34677: "SGILog", 34887: "LERC", 34892: "lossy JPEG of DNG", 52546: "JPEG XL"},
    **{
        34713: "Nikon NEF",
        32767: "Sony ARW",
        32770: "Samsung SRW",
        65000: "Kodak DCR",
        6: "JPEG",
        7: "JPEG",
        50001: "WebP",
    },
    **{2: "fax", 3: "fax", 4: "fax", 32771: "fax"},
}

# Exceeding this many bytes of decoded samples is refused, as the number of pixels is.
_MAX_DECODED_BYTES = 2 << 30
_LARGEST_TILE_BYTES = 64 << 20

TRANSPOSES: dict[int, PIL.Image.Transpose] = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""Maps the orientation of TIFF and EXIF to the operation that turns the stored image upright."""

_CONVERT = convert_with("magick 'FILE[0]' -depth 8 page.png")


@dataclasses.dataclass(frozen=True)
class TiffPage:
    """Directory of one page.

    Attributes:
      tags: values of the tags that matter here.
      next_offset: offset of the next page's directory, or 0.
      byte_order: "<" or ">".
      number: number of the page in the file, from 0.
      is_big: whether the file is a BigTIFF, with 64-bit offsets.
    """

    tags: dict[int, tuple[int, ...]]
    next_offset: int
    byte_order: str
    number: int = 0
    is_big: bool = False

    def value(self, tag: int, default: int = 0) -> int:
        """Returns the first value of a tag."""
        values = self.tags.get(tag)
        return values[0] if values else default

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored, before the orientation is applied."""
        return self.value(_WIDTH), self.value(_HEIGHT)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each sample of a pixel."""
        is_old_jpeg = self.value(_COMPRESSION, 1) == 6
        bits = self.tags.get(_BITS) or (8 if is_old_jpeg else 1,)
        number = self.value(_SAMPLES, 3 if is_old_jpeg else 1)
        return bits * number if len(bits) == 1 and number <= 64 else bits[:number]

    @property
    def extra_samples(self) -> tuple[int, ...]:
        """Kinds of the samples after the colors: 0 unspecified, 1 premultiplied alpha, 2 alpha."""
        return self.tags.get(_EXTRA_SAMPLES) or ()

    @property
    def sample_formats(self) -> set[int]:
        """The distinct formats of the samples."""
        return set(self.tags.get(_SAMPLE_FORMAT) or (_UNSIGNED,))

    @property
    def is_reduced(self) -> bool:
        """True if the page is a smaller copy of another one."""
        return bool(self.value(_SUBFILE) & 1) or self.value(_OLD_SUBFILE) == 2

    @property
    def is_raw_photo(self) -> bool:
        """True if the file stores the raw photo of a camera, maybe next to a preview."""
        photometric = self.value(_PHOTOMETRIC)
        return _DNG_VERSION in self.tags or photometric in (32803, 34892)


def is_tiff(data: bytes) -> bool:
    """Returns whether a file begins as TIFF or BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_page(data: bytes, number: int | None = None) -> TiffPage:
    """Returns the directory of a page.

    Args:
      data: the encoded bytes.
      number: number of the page, from 0. By default the first that is not a reduced copy of another page.

    Raises:
      ValueError: if the file is damaged.
      UnreadableImageError: if the file is a camera's raw photo.
    """
    big = data[2:4] in (b"+\0", b"\0+")
    order = "<" if data[:2] == b"II" else ">"
    try:
        (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        pages: list[TiffPage] = []
        seen = set()
        while offset and offset not in seen and len(pages) <= (64 if number is None else number):
            seen.add(offset)
            page = _read_directory(data, offset, order, big, len(pages))
            if page.is_raw_photo:
                raise UnreadableImageError(
                    "a raw photo of a camera (DNG or a relative of it)", convert_with("magick FILE page.png")
                )
            pages.append(page)
            if page.number == number or (number is None and not page.is_reduced):
                return page
            offset = page.next_offset
    except struct.error as error:
        raise ValueError(f"damaged TIFF directory ({error})") from error
    if number is not None or not pages:
        raise ValueError("no such page in the TIFF file")
    if _SUB_DIRECTORIES in pages[0].tags:
        raise UnreadableImageError(
            "a raw photo of a camera, with a small preview", convert_with("magick FILE page.png")
        )
    return pages[0]


def _read_directory(data: bytes, offset: int, order: str, big: bool, number: int) -> TiffPage:
    """Reads one directory; see the TIFF and BigTIFF specifications for the layout."""
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    offset += 8 if big else 2
    entry_size, inline = (20, 8) if big else (12, 4)
    if count * entry_size > len(data):
        raise ValueError("damaged TIFF directory (too many entries)")
    tags = {}
    for entry in range(offset, offset + count * entry_size, entry_size):
        tag, kind, length = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, entry)
        if tag not in _WANTED or kind not in _FIELD_TYPES:
            continue
        layout = _FIELD_TYPES[kind]
        size = struct.calcsize(order + layout) * length
        if size > len(data):
            raise ValueError(f"damaged TIFF directory (tag {tag})")
        start = entry + entry_size - inline
        if size > inline:
            (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, start)
        tags[tag] = struct.unpack_from(f"{order}{length}{layout}", data, start)
    (following,) = struct.unpack_from(order + ("Q" if big else "I"), data, offset + count * entry_size)
    return TiffPage(tags, following, order, number, big)


def page_of_image(image: PIL.TiffImagePlugin.TiffImageFile) -> TiffPage:
    """Returns the directory of an image that PIL has opened."""
    tags = {}
    for tag in _WANTED:
        values = image.tag_v2.get(tag)
        values = values if isinstance(values, tuple) else (values,)
        if all(isinstance(value, int) for value in values):
            tags[tag] = values
    return TiffPage(tags, image.tag_v2.next, "<" if image.tag_v2.prefix == b"II" else ">", image.tell())


def is_read_by_pillow(page: TiffPage) -> bool:
    """Returns whether Pillow reads pages of this layout correctly.

    Palettes, fax and JPEG compressions and the color spaces YCbCr and Lab are always left to Pillow, if they have the
    usual 8 bits or less; other cases are refused by `decode_page`.
    """
    photometric, compression, bits, extra = (
        page.value(_PHOTOMETRIC),
        page.value(_COMPRESSION, 1),
        page.bits,
        page.extra_samples,
    )
    chunky = page.value(_PLANAR, 1) == 1
    if page.is_big and page.byte_order == ">":
        return False
    if page.sample_formats != {_UNSIGNED} or page.value(_FILL_ORDER, 1) not in (1, 2):
        return False
    if compression in _JPEG_COMPRESSIONS:
        return set(bits) == {8} and photometric in (0, 1, 2, 5, 6)
    if compression in _FAX_COMPRESSIONS:
        return bits == (1,) and photometric in (0, 1, 3)
    if compression not in _PLAIN_COMPRESSIONS:
        return False
    if page.value(_FILL_ORDER, 1) == 2:
        return photometric in (0, 1, 3) and bits in ((1,), (2,), (4,), (8,))
    if photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        return bits in ((1,), (2,), (4,), (8,)) or (
            photometric == _BLACK_IS_ZERO and bits == (8, 8) and chunky and bool(extra)
        )
    if photometric == _RGB:
        return bits == (8, 8, 8) or (bits == (8, 8, 8, 8) and chunky and extra in ((), (0,), (1,), (2,)))
    if photometric == _INDEXED:
        return chunky and (bits in ((1,), (2,), (4,), (8,)) or (bits == (8, 8) and extra in ((0,), (2,))))
    if photometric == _CMYK:
        return bits == (8, 8, 8, 8) and chunky and page.value(_INK_SET, 1) == 1
    if photometric == _YCBCR:
        # Without compression, Pillow assumes that the colors have the resolution of the gray values.
        return bits == (8, 8, 8) and chunky and _is_full_resolution(page)
    return photometric == _LAB and bits == (8, 8, 8) and chunky


def _is_full_resolution(page: TiffPage) -> bool:
    """Returns whether the colors of a YCbCr page are not subsampled."""
    if page.value(_COMPRESSION, 1) != 1:
        return True  # libtiff handles all cases.
    width, height = page.size
    # Pillow writes files without the tag, whose default is 2 x 2, and without subsampling.
    return page.tags.get(_SUBSAMPLING) == (1, 1) or sum(page.tags.get(_STRIP_COUNTS, ())) >= 3 * width * height


def decode_page(data: bytes, page: TiffPage) -> PIL.Image.Image:
    """Decodes a page as an upright, opaque image of mode L or RGB.

    Raises:
      UnreadableImageError: if pages of this layout are not read.
      ValueError: if the file is damaged.
    """
    photometric, extra = page.value(_PHOTOMETRIC), page.extra_samples
    samples = _decode_samples(data, page)
    colors = _COLORS[photometric]
    if not extra and samples.shape[-1] == colors + 1 and photometric == _RGB:
        extra = (2,)  # as in Pillow: a fourth sample without description is alpha
    extra = extra[: samples.shape[-1] - colors]
    if samples.shape[-1] - colors != len(extra) or (colors == 1 and len(extra) > 1):
        raise _refusal(page)
    alpha_kind = extra[0] if extra and extra[0] in (1, 2) else None
    used = samples[..., : colors + (alpha_kind is not None)]
    pixels = to_bytes(used, _significant_bits(page), white_is_zero=photometric == _WHITE_IS_ZERO)
    color = pixels[..., :colors]
    if photometric == _CMYK:
        color = np.asarray(PIL.Image.fromarray(np.ascontiguousarray(color), "CMYK").convert("RGB"))
    if alpha_kind is not None:
        alpha = pixels[..., colors:].astype(np.uint16)
        alpha = 255 - alpha if photometric == _WHITE_IS_ZERO else alpha
        weighted = color.astype(np.uint16) * (alpha if alpha_kind == 2 else 255)
        color = np.clip((weighted + (255 - alpha) * 255 + 127) // 255, 0, 255).astype(np.uint8)
    color = np.ascontiguousarray(color[..., 0] if color.shape[-1] == 1 else color)
    image = PIL.Image.fromarray(color)
    orientation = page.value(_ORIENTATION, 1)
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image


def correct_loaded_page(image: PIL.Image.Image, page: TiffPage) -> PIL.Image.Image:
    """Returns an image that PIL has decoded from a layout that it reads wrong, corrected in memory.

    Raises:
      UnreadableImageError: if the samples are lost.
    """
    bits, white_is_zero = page.bits[0], page.value(_PHOTOMETRIC) == _WHITE_IS_ZERO
    chunky, is_signed = page.value(_PLANAR, 1) == 1, _SIGNED in page.sample_formats
    # libtiff has already converted the byte order of compressed samples, and PIL does it again.
    is_swapped = page.byte_order == ">" and page.value(_COMPRESSION, 1) != 1
    samples = np.asarray(image)
    if len(page.bits) == 1 and image.mode.startswith("I;16") and not is_signed:
        return PIL.Image.fromarray(to_bytes(samples, _significant_bits(page), white_is_zero=white_is_zero))
    if len(page.bits) == 1 and image.mode == "L" and bits == 8 and is_signed:
        return PIL.Image.fromarray(to_bytes(samples.view(np.int8), white_is_zero=white_is_zero))
    if image.mode in ("I", "F") and not is_swapped:
        samples = samples if image.mode == "F" or is_signed else samples.view(np.uint32)
        return PIL.Image.fromarray(to_bytes(samples, None if image.mode == "F" else bits, white_is_zero=white_is_zero))
    if (
        image.mode in ("RGB", "RGBA", "CMYK", "LA", "La")
        and not is_signed
        and (chunky or image.mode in ("RGB", "CMYK") and bits == 8)
    ):
        return image
    raise UnreadableImageError(
        f"{_refusal(page).what}, which PIL has decoded wrong",
        "Pass the path or the bytes of the file instead of a PIL image.",
    )


def _significant_bits(page: TiffPage) -> int:
    """Returns the bits of a sample, fewer than are stored if the tag MaxSampleValue says so."""
    bits = page.bits[0]
    # The tag often has the largest value of the image instead, which says nothing about white.
    largest = max(page.tags.get(_MAX_VALUE, (0,)))
    significant = (largest + 1).bit_length() - 1
    return (
        significant
        if page.sample_formats <= {1, 4} and largest == 2**significant - 1 and 8 <= significant < bits
        else bits
    )


def _refusal(page: TiffPage) -> UnreadableImageError:
    """Returns the error that names the layout of a page."""
    bits = "/".join(str(bits) for bits in page.bits[:8])
    if len(set(page.bits)) == 1:
        bits = f"{len(page.bits)} x {page.bits[0]}" if len(page.bits) > 1 else str(page.bits[0])
    photometric, compression = page.value(_PHOTOMETRIC), page.value(_COMPRESSION, 1)
    names = {0: "white-is-zero gray", 1: "gray", 2: "RGB", 5: "CMYK"} | _PHOTOMETRIC_NAMES
    compressions = _PLAIN_COMPRESSIONS | _COMPRESSION_NAMES
    formats = "/".join(_FORMAT_NAMES.get(kind, "unknown") for kind in sorted(page.sample_formats))
    return UnreadableImageError(
        f"a TIFF of an unusual layout: {names.get(photometric, f'color space {photometric}')} of {bits} {formats} "
        f"bits, compression {compressions.get(compression, compression)}, "
        f"planar configuration {page.value(_PLANAR, 1)}",
        _CONVERT,
    )


def _decode_samples(data: bytes, page: TiffPage) -> np.ndarray:
    """Returns the samples of a page, [height, width, samples], in the native byte order."""
    bits, formats = page.bits, page.sample_formats
    is_known = page.value(_PHOTOMETRIC) in _COLORS and page.value(_COMPRESSION, 1) in _PLAIN_COMPRESSIONS
    if not is_known or len(set(bits)) != 1 or len(formats) != 1 or page.value(_INK_SET, 1) != 1:
        raise _refusal(page)
    (sample_format,) = formats
    widths = {_SIGNED: (8, 16, 32, 64), _FLOAT: (16, 32, 64), _UNSIGNED: (*range(1, 33), 64), _UNDEFINED: range(1, 33)}
    predictor = page.value(_PREDICTOR, 1) if page.value(_COMPRESSION, 1) not in (1, 32773) else 1
    if bits[0] not in widths.get(sample_format, ()) or predictor not in (1, 2, 3):
        raise _refusal(page)
    if predictor != 1 and bits[0] not in (8, 16, 32, 64):
        raise _refusal(page)
    planes = len(bits) if page.value(_PLANAR, 1) == 2 else 1
    width, height = page.size
    if width * height * len(bits) * (bits[0] + 7) // 8 > _MAX_DECODED_BYTES:
        raise UnreadableImageError(
            f"a TIFF of {width} x {height} pixels of {len(bits)} x {bits[0]} bits, too large to decode", _CONVERT
        )
    decoded = [_decode_plane(data, page, plane, planes, predictor) for plane in range(planes)]
    samples = decoded[0] if planes == 1 else np.concatenate(decoded, axis=-1)
    if sample_format in (_SIGNED, _FLOAT):
        samples = samples.view(samples.dtype.str.replace("u", "i" if sample_format == _SIGNED else "f"))
    return samples


def _decode_plane(data: bytes, page: TiffPage, plane: int, planes: int, predictor: int) -> np.ndarray:
    """Returns the samples of one plane as unsigned integers, [height, width, samples per pixel of the plane]."""
    width, height = page.size
    bits = page.bits[0]
    per_pixel = len(page.bits) // planes
    is_tiled = _TILE_OFFSETS in page.tags
    tile_width = page.value(_TILE_WIDTH) if is_tiled else width
    tile_height = page.value(_TILE_HEIGHT) if is_tiled else page.value(_ROWS_PER_STRIP, height) or height
    tile_height = tile_height if is_tiled else min(tile_height, height)
    if not (width and height and tile_width and tile_height):
        raise ValueError("the TIFF file states no size")
    row_bytes = -(-tile_width * per_pixel * bits // 8)
    across, down = -(-width // tile_width), -(-height // tile_height)
    offsets = page.tags.get(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS, ())
    counts = page.tags.get(_TILE_COUNTS if is_tiled else _STRIP_COUNTS, ())
    if page.value(_COMPRESSION, 1) == 1:
        # The sizes are known, and many files state none or wrong ones. The last strip may be shorter.
        last = height - (down - 1) * tile_height
        rows_of_chunks = [tile_height] * (down * across) if is_tiled else [tile_height] * (down - 1) + [last]
        counts = tuple(row_bytes * rows for rows in rows_of_chunks) * planes
    chunks = slice(plane * across * down, (plane + 1) * across * down)
    if len(offsets[chunks]) != across * down or len(counts[chunks]) != across * down:
        raise ValueError(f"the TIFF file has {len(offsets)} strips or tiles, fewer than its size needs")
    rows = down * tile_height if is_tiled else height
    # Tiles of a small page may be larger than the page, but not by any factor.
    if row_bytes * across * rows > max(_LARGEST_TILE_BYTES, 4 * row_bytes * width * height // tile_width):
        raise ValueError(f"the tiles of the TIFF file, {tile_width} x {tile_height}, are larger than its pages")
    raw = _decode_bytes(
        data, page, offsets[chunks], counts[chunks], (row_bytes * across, rows), (row_bytes, tile_height)
    )
    # [rows, tiles across, bytes of a tile's row] -> [rows, tiles across, pixels of a tile's row, samples]
    raw = raw.reshape(rows, across, row_bytes)
    samples = _unpack(raw, bits, tile_width * per_pixel, page.byte_order, predictor, per_pixel)
    samples = samples.reshape(rows, across, tile_width, per_pixel)
    if predictor == 2:
        # Samples are stored as differences from the pixel on the left, modulo their range.
        samples = np.cumsum(samples, axis=2, dtype=samples.dtype)
    return samples.reshape(rows, across * tile_width, per_pixel)[:height, :width]


def _decode_bytes(
    data: bytes,
    page: TiffPage,
    offsets: tuple[int, ...],
    counts: tuple[int, ...],
    size: tuple[int, int],
    tile_size: tuple[int, int],
) -> np.ndarray:
    """Returns the decompressed bytes of strips or tiles as one array, uint8 [rows, bytes].

    Args:
      data: the file.
      page: the directory that describes the compression.
      offsets: where the strips or tiles begin.
      counts: their compressed sizes.
      size: bytes per row and number of rows, all tiles together.
      tile_size: bytes per row and number of rows of a strip or tile.
    """
    is_tiled = _TILE_OFFSETS in page.tags
    tags = {
        _WIDTH: (size[0],),
        _HEIGHT: (size[1],),
        _BITS: (8,),
        _COMPRESSION: (page.value(_COMPRESSION, 1),),
        _PHOTOMETRIC: (_BLACK_IS_ZERO,),
        _FILL_ORDER: (page.value(_FILL_ORDER, 1),),
        _SAMPLES: (1,),
        _PLANAR: (1,),
    }
    if is_tiled:
        tags |= {
            _TILE_WIDTH: (tile_size[0],),
            _TILE_HEIGHT: (tile_size[1],),
            _TILE_OFFSETS: offsets,
            _TILE_COUNTS: counts,
        }
    else:
        tags |= {_ROWS_PER_STRIP: (tile_size[1],), _STRIP_OFFSETS: offsets, _STRIP_COUNTS: counts}
    if max(map(sum, zip(offsets, counts, strict=True))) > len(data):
        raise ValueError("the TIFF file is truncated")
    file = io.BytesIO(_with_directory(data, tags))
    # Not PIL.Image.open: its limit of pixels counts bytes here. The caller has checked the size.
    with PIL.TiffImagePlugin.TiffImageFile(file) as image:
        return np.asarray(image)


def _with_directory(data: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """Returns the file with another directory, as little-endian TIFF with all values as 32-bit integers."""
    out = [data[8:], b"\0" * (len(data) % 2)]
    position = len(data) + len(data) % 2
    entries = []
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            out.append(packed)
            packed, position = struct.pack("<I", position), position + len(packed)
        entries.append(struct.pack("<HHI", tag, 4, len(values)) + packed)
    out += [struct.pack("<H", len(entries)), *entries, struct.pack("<I", 0)]
    return b"".join([b"II*\0", struct.pack("<I", position), *out])


def _unpack(raw: np.ndarray, bits: int, count: int, byte_order: str, predictor: int, per_pixel: int) -> np.ndarray:
    """Returns `count` samples of each row of bytes as unsigned integers in the native byte order.

    Args:
      raw: uint8 [..., bytes].
      bits: bits per sample.
      count: samples per row.
      byte_order: byte order of samples of 16 and more bits. Bits within a byte start at the highest.
      predictor: 3 for the floating-point predictor.
      per_pixel: samples per pixel.
    """
    if predictor == 3:
        # The first bytes of all values, their second bytes, ..., as differences from the pixel on the left.
        raw = np.cumsum(raw.reshape(*raw.shape[:-1], -1, per_pixel), axis=-2, dtype=np.uint8).reshape(raw.shape)
        planes = raw.reshape(*raw.shape[:-1], bits // 8, count)
        raw, byte_order = np.ascontiguousarray(np.swapaxes(planes, -1, -2)).reshape(raw.shape), ">"
    if bits == 8:
        return raw
    if bits in (16, 32, 64):
        return np.ascontiguousarray(raw).view(f"{byte_order}u{bits // 8}").astype(f"u{bits // 8}", copy=False)
    if bits == 24:
        parts = raw.reshape(*raw.shape[:-1], count, 3).astype(np.uint32)
        parts = parts[..., ::-1] if byte_order == "<" else parts
        return parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]
    dtype = np.uint8 if bits < 8 else np.uint16 if bits <= 16 else np.uint32
    out = np.empty((*raw.shape[:-1], count), dtype)
    # Row by row of the page, because a bit takes a byte meanwhile.
    for row in range(len(raw)):
        single = np.unpackbits(raw[row], axis=-1, count=count * bits).reshape(*raw.shape[1:-1], count, bits)
        value = np.zeros(single.shape[:-1], dtype)
        for bit in range(bits):
            value = value << 1 | single[..., bit]
        out[row] = value
    return out
