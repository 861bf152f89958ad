"""Writes TIFF files of layouts that Pillow cannot write, after TIFF 6.0 and the BigTIFF proposal."""

import struct
import zlib

import numpy as np


def scene() -> np.ndarray:
    """Returns a page of 16 x 20 with a black bar and a ramp, as the exact bytes of a share from 0 to 1."""
    page = np.full((16, 20), 255, np.uint8)
    page[3:6, 2:15] = 0
    page[9:13] = np.linspace(0, 255, 20).astype(np.uint8)
    return page


def color_scene() -> np.ndarray:
    """Returns a page in color, [16, 20, 3]."""
    page = scene()
    return np.stack([page, page[::-1], page[:, ::-1]], axis=-1)


def tiff(samples: np.ndarray, bits: int | None = None, *, photometric: int = 1, **options) -> bytes:
    """Returns a TIFF file of one page.

    Args:
      samples: [height, width] or [height, width, samples].
      bits: bits per sample; samples of other than whole bytes are packed.
      photometric: photometric interpretation.
      **options: see `directory`; `big` for BigTIFF.
    """
    order, big = options.get("order", "<"), options.pop("big", False)
    contents = (b"II" if order == "<" else b"MM") + struct.pack(
        order + ("HHHQ" if big else "HI"), *([43, 8, 0, 16] if big else [42, 8])
    )
    return contents + directory(samples, bits, photometric, len(contents), big=big, **options)


def directory(
    samples: np.ndarray,
    bits: int | None,
    photometric: int,
    start: int,
    *,
    order: str = "<",
    big: bool = False,
    planar: int = 1,
    deflate: bool = False,
    predictor: int = 1,
    tile: tuple[int, int] | None = None,
    rows_per_strip: int = 5,
    tags: dict[int, tuple[int, ...]] | None = None,
    following: int = 0,
) -> bytes:
    """Returns a directory and its pixels, to be placed at the offset `start`.

    Args:
      samples: see `tiff`.
      bits: see `tiff`.
      photometric: see `tiff`.
      start: offset of the directory in the file.
      order: byte order, "<" or ">".
      big: whether the file is a BigTIFF.
      planar: 1 for pixels one after the other, 2 for planes.
      deflate: whether to compress.
      predictor: 1 none, 2 horizontal differences, 3 floating point.
      tile: width and height of the tiles; None for strips.
      rows_per_strip: height of the strips.
      tags: further tags, or other values.
      following: offset of the next page's directory.
    """
    samples = samples[..., None] if samples.ndim == 2 else samples
    height, width, count = samples.shape
    bits = bits or 8 * samples.dtype.itemsize
    planes = [samples] if planar == 1 else [samples[..., plane : plane + 1] for plane in range(count)]
    tile_width, tile_height = tile or (width, rows_per_strip)
    chunks = []
    for plane in planes:
        for top in range(0, height, tile_height):
            for left in range(0, width, tile_width):
                chunk = plane[top : top + tile_height, left : left + tile_width]
                if tile:
                    padding = [(0, tile_height - chunk.shape[0]), (0, tile_width - chunk.shape[1]), (0, 0)]
                    chunk = np.pad(chunk, padding)
                packed = _pack(chunk, bits, order, predictor)
                chunks.append(zlib.compress(packed) if deflate else packed)
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[samples.dtype.kind]
    values = {
        256: (width,), 257: (height,), 258: (bits,) * count, 259: (8 if deflate else 1,), 262: (photometric,),
        277: (count,), 284: (planar,), 317: (predictor,), 339: (kind,) * count,
    }  # fmt: skip
    values |= {322: (tile_width,), 323: (tile_height,)} if tile else {278: (rows_per_strip,)}
    offsets, counts = (324, 325) if tile else (273, 279)
    values |= {offsets: (0,) * len(chunks), counts: tuple(map(len, chunks))} | (tags or {})
    pointer, inline, entry = ("Q", 8, "HHQ") if big else ("I", 4, "HHI")
    head = 8 if big else 2
    end = start + head + len(values) * (struct.calcsize("<" + entry) + inline) + inline
    # Values that do not fit in their entry follow the directory; the pixels follow them.
    where = {}
    for tag, numbers in values.items():
        if 4 * len(numbers) > inline:
            where[tag], end = end, end + 4 * len(numbers)
    positions = np.cumsum([end, *map(len, chunks)])[:-1]
    values[offsets] = tuple(int(position) for position in positions)
    out, outside = [struct.pack(order + ("Q" if big else "H"), len(values))], []
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        out.append(struct.pack(order + entry, tag, 4, len(numbers)))
        out.append(struct.pack(order + pointer, where[tag]) if tag in where else packed.ljust(inline, b"\0"))
    for tag in where:  # in the order of their offsets
        outside.append(struct.pack(f"{order}{len(values[tag])}I", *values[tag]))
    return b"".join([*out, struct.pack(order + pointer, following), *outside, *chunks])


def _pack(chunk: np.ndarray, bits: int, order: str, predictor: int) -> bytes:
    """Returns the bytes of a strip or tile before compression."""
    if predictor == 2:
        unsigned = chunk.view(f"u{chunk.dtype.itemsize}")
        chunk = np.concatenate([unsigned[:, :1], np.diff(unsigned, axis=1)], axis=1)
    if predictor == 3:
        rows, width, count = chunk.shape
        planes = chunk.astype(chunk.dtype.newbyteorder(">")).view(np.uint8).reshape(rows, width * count, -1)
        planes = np.ascontiguousarray(planes.swapaxes(1, 2)).reshape(rows, -1, count)
        return np.concatenate([planes[:, :1], np.diff(planes, axis=1)], axis=1).tobytes()
    if bits % 8 == 0 and bits != 24:
        return chunk.astype(chunk.dtype.newbyteorder(order)).tobytes()
    if bits == 24:
        parts = chunk.astype(np.dtype(np.uint32).newbyteorder(order)).view(np.uint8).reshape(*chunk.shape, 4)
        return (parts[..., :3] if order == "<" else parts[..., 1:]).tobytes()
    single = chunk.reshape(len(chunk), -1, 1).astype(np.uint32) >> np.arange(bits - 1, -1, -1, dtype=np.uint32) & 1
    return np.packbits(single.astype(np.uint8).reshape(len(chunk), -1), axis=-1).tobytes()
