"""Scales image samples of any width to bytes, 0 black to 255 white.

A format says how wide a sample is, but not always which value is white. These rules decide:

    unsigned, n bits   0 is black, 2^n - 1 is white
    signed, n bits     with negative values: -2^(n-1) is black, 2^(n-1) - 1 is white; without: 0 and 2^(n-1) - 1
    floating point     0 is black; white is 1, 255, 1023, 4095 or 65535, the smallest that holds the largest value, with
                       a tenth to spare for the overshoot of resampling. NaN is no value, which is white like paper

Narrow values in a wide type are common: a camera's 12 bits in a 16-bit file. If all values fit in at least three bits
fewer than the type has, the smallest of 8, 10, 12, 16, 24, 32 and 48 bits that holds them is their width. Such an image
would otherwise be black. Where zero is white, it takes eight bits fewer, because a blank page has low values, too.

A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only numpy and PIL.
"""

import numpy as np

from alignvlm_jax.data.file_kinds import UnreadableImageError

_WIDTHS = (8, 10, 12, 16, 24, 32, 48)
_FLOAT_WHITES = (1.0, 255.0, 1023.0, 4095.0, 65535.0)
_OVERSHOOT = 1.1  # Lanczos and bicubic filters exceed the range of a sharp edge by up to a tenth.
_BLOCK = 1 << 20  # samples that are scaled at once, which bounds the memory for temporary values


def to_bytes(
    samples: np.ndarray, bits: int | None = None, *, white_is_zero: bool = False, fixed: bool = False
) -> np.ndarray:
    """Scales samples to bytes by the rules of this module.

    Args:
      samples: array of any shape, of unsigned, signed or floating-point type.
      bits: number of significant bits of an integer; by default all bits of the type.
      white_is_zero: whether the range is inverted.
      fixed: whether unsigned samples use their full width even if all of them are small.

    Raises:
      UnreadableImageError: if the values of signed or floating-point samples do not tell their range.
    """
    bits = bits or 8 * samples.dtype.itemsize
    if samples.size == 0:
        return samples.astype(np.uint8)
    if samples.dtype.kind == "f":
        black, white = 0.0, _float_white(samples)
    elif samples.dtype.kind == "i":
        black, white = _signed_range(int(samples.min()), int(samples.max()), bits)
    else:
        width = bits if fixed else _width(int(samples.max()), bits, 8 if white_is_zero else 3)
        black, white = 0, 2**width - 1
    if white_is_zero:
        black, white = white, black
    if samples.dtype.itemsize == 2 and samples.size > 1 << 17:
        # A table of all values is faster than arithmetic for each sample.
        table = _scale(np.arange(1 << 16, dtype=np.uint16).view(samples.dtype), black, white)
        return table[np.ascontiguousarray(samples).view(np.uint16)]
    out = np.empty(samples.size, np.uint8)
    flat = samples.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        out[start : start + _BLOCK] = _scale(flat[start : start + _BLOCK], black, white)
    return out.reshape(samples.shape)


def _scale(samples: np.ndarray, black: float, white: float) -> np.ndarray:
    """Maps samples linearly to bytes, with `black` at 0 and `white` at 255."""
    values = (samples.astype(np.float64) - black) * (255.0 / (white - black))
    values = np.nan_to_num(values, nan=255.0, posinf=255.0, neginf=0.0)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _width(largest: int, bits: int, min_unused: int) -> int:
    """Returns the number of bits that values up to `largest` have, in a type of `bits` bits."""
    for width in _WIDTHS:
        if width <= bits - min_unused and largest < 2**width:
            return width
    return bits


def _signed_range(smallest: int, largest: int, bits: int) -> tuple[int, int]:
    """Returns black and white of signed samples."""
    if smallest >= 0:
        return 0, 2 ** _width(largest, bits - 1, 3) - 1
    for width in sorted({8, 16, 32, bits}):
        if width <= bits and -(2 ** (width - 1)) <= smallest and largest < 2 ** (width - 1):
            break
    if (largest - smallest) * 16 < 2**width:
        raise UnreadableImageError(
            f"its signed samples, {smallest} to {largest}, do not tell which value is white",
            "Scale them to 8 bits and save it as PNG.",
        )
    return -(2 ** (width - 1)), 2 ** (width - 1) - 1


def _float_white(samples: np.ndarray) -> float:
    """Returns the value of white in floating-point samples."""
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return 1.0
    smallest, largest = float(finite.min()), float(finite.max())
    white = next((white for white in _FLOAT_WHITES if largest <= white * _OVERSHOOT), None)
    if white is not None and smallest >= white * (1 - _OVERSHOOT) and (white == 1.0 or largest * 16 >= white):
        return white
    raise UnreadableImageError(
        f"its floating-point samples, {smallest:g} to {largest:g}, do not tell which value is white",
        "Scale them to 0 ... 1 or to 8 bits, and save it again.",
    )
