"""Compact JSON encoding of a page's words, read by web/data.js.

Axes: T patches, k words per patch at most, E entries (the words kept of all patches, patch after patch), U distinct
words among the entries, G attribution maps.

Arrays are written as base64 of little-endian numbers:

    counts          uint16 [T]   number of words kept of each patch: those above the floor, and always the likeliest
    entries         uint16 [E]   index into the page's U words; uint32 if U > 65536
    probabilities   uint16 [E]   ln p on a uniform grid from `_LOWEST` to 0; the error is at most 0.013 % of p
    entropy         uint16 [T]   on a uniform grid from 0 to ln V
    ids             uint32 [U]   token ids of the words, increasing; `words` has their texts
"""

import base64
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

FLOOR = 1e-5
"""Words less likely than this are dropped, except the likeliest word of each patch."""

MAX_ENTRIES = 400_000
"""Maximum number of words stored for all patches together. The floor is raised until the words fit."""

_LOWEST = -16.0
# Largest uint16: the number of steps of the uniform grids.
_STEPS = 65535


def pack_words(
    ids: Int[np.ndarray, "T k"],
    probabilities: Float[np.ndarray, "T k"],
    entropy: Float[np.ndarray, " T"],
    *,
    vocabulary: int,
    token_text: Callable[[int], str],
) -> dict:
    """Returns the patches' words as JSON.

    Args:
      ids: token ids, likeliest first.
      probabilities: their probabilities.
      entropy: entropy of each patch's complete distribution, in nats.
      vocabulary: V, the number of words that the distribution ranges over.
      token_text: returns the text of a token.
    """
    floor = FLOOR
    if probabilities.size > MAX_ENTRIES:
        # The probability of the last word that still fits.
        floor = max(floor, float(np.partition(probabilities, -MAX_ENTRIES, axis=None)[-MAX_ENTRIES]))
    # Drop the words below the floor, and number the distinct words of the page.
    kept = probabilities >= floor
    # Words are sorted by probability: the first one is the likeliest.
    kept[:, 0] = True
    words, entries = np.unique(ids[kept], return_inverse=True)
    logs = np.log(np.clip(probabilities[kept], math.exp(_LOWEST), 1.0))
    share = np.clip(entropy / max(math.log(vocabulary), 1e-9), 0.0, 1.0)
    return {
        "vocabulary": vocabulary,
        "kept": ids.shape[1],
        "floor": floor,
        "lowest": _LOWEST,
        "words": [token_text(int(word)) for word in words],
        "ids": encode(words, "<u4"),
        "counts": encode(kept.sum(axis=1), "<u2"),
        "entries": encode(entries, "<u2" if len(words) <= 65536 else "<u4"),
        "probabilities": encode(np.round((logs / _LOWEST) * _STEPS), "<u2"),
        "entropy": encode(np.round(share * _STEPS), "<u2"),
    }


def pack_maps(maps: Float[np.ndarray, "G T"]) -> dict:
    """Returns signed maps as int16 [G, T]; +-32767 stands for the largest magnitude of each map (`scales`)."""
    # int16, because thousands of small shares must still add up to the same sum. With the 127 steps of int8, a tenth of
    # the sum would be lost on a nine-tile page.
    scales = np.max(np.abs(maps), axis=1, initial=1e-12)
    return {"scales": scales.tolist(), "values": encode(np.round(maps / scales[:, None] * 32767), "<i2")}


def encode(numbers: np.ndarray, dtype: str) -> str:
    """Returns base64 of the numbers in a little-endian dtype."""
    return base64.b64encode(np.ascontiguousarray(numbers, np.dtype(dtype)).tobytes()).decode()


def decode(text: str, dtype: str) -> np.ndarray:
    """Returns the numbers that `encode` was given."""
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype))
