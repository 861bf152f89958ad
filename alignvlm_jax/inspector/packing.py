"""A page's words in few bytes, as JSON that web/data.js reads.

Axes: T patches, k words of each at most, E entries: the words kept of all patches, one patch after the other; U
different words among them.

Numbers become base64 of little-endian typed arrays:

    counts          uint16 [T]   words kept of each patch: those above the floor, and the likeliest always
    entries         uint16 [E]   which of the page's U words; uint32 where U > 65536
    probabilities   uint16 [E]   ln p from `_LOWEST` to 0, evenly: off by at most 0.013 % of p
    entropy         uint16 [T]   from 0 to ln V, evenly
    ids             uint32 [U]   the words' token ids, rising; `words` has their texts
"""

import base64
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

FLOOR = 1e-5
"""Words less likely than this are left out, except a patch's likeliest."""

MOST_ENTRIES = 400_000
"""Words kept of all patches together, whatever their number: the floor is raised until no more are left."""

_LOWEST = -16.0
_STEPS = 65535


def pack_words(
    ids: Int[np.ndarray, "T k"],
    probabilities: Float[np.ndarray, "T k"],
    entropy: Float[np.ndarray, " T"],
    *,
    vocabulary: int,
    text_of: Callable[[int], str],
) -> dict:
    """The patches' words as JSON.

    Args:
      ids: token ids, likeliest first.
      probabilities: theirs.
      entropy: of each patch's whole distribution, in nats.
      vocabulary: V, how many words there were to choose from.
      text_of: a token's text.
    """
    floor = FLOOR
    if probabilities.size > MOST_ENTRIES:
        floor = max(floor, float(np.partition(probabilities, -MOST_ENTRIES, axis=None)[-MOST_ENTRIES]))
    kept = probabilities >= floor
    kept[:, 0] = True
    words, entries = np.unique(ids[kept], return_inverse=True)
    logs = np.log(np.clip(probabilities[kept], math.exp(_LOWEST), 1.0))
    share = np.clip(entropy / max(math.log(vocabulary), 1e-9), 0.0, 1.0)
    return {
        "vocabulary": vocabulary,
        "kept": ids.shape[1],
        "floor": floor,
        "lowest": _LOWEST,
        "words": [text_of(int(word)) for word in words],
        "ids": encode(words, "<u4"),
        "counts": encode(kept.sum(axis=1), "<u2"),
        "entries": encode(entries, "<u2" if len(words) <= 65536 else "<u4"),
        "probabilities": encode(np.round((logs / _LOWEST) * _STEPS), "<u2"),
        "entropy": encode(np.round(share * _STEPS), "<u2"),
    }


def pack_maps(maps: Float[np.ndarray, "G T"]) -> dict:
    """Signed maps as int16 [G, T], each in 32767 steps either way of its own largest magnitude (`scales`).

    Thousands of small shares are to add up to what they were: 127 steps lose a tenth of the sum on a nine-tile page.
    """
    scales = np.max(np.abs(maps), axis=1, initial=1e-12)
    return {"scales": scales.tolist(), "values": encode(np.round(maps / scales[:, None] * 32767), "<i2")}


def encode(numbers: np.ndarray, dtype: str) -> str:
    """Base64 of the numbers in a little-endian dtype."""
    return base64.b64encode(np.ascontiguousarray(numbers, np.dtype(dtype)).tobytes()).decode()


def decode(text: str, dtype: str) -> np.ndarray:
    """Undoes `encode`."""
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype))
