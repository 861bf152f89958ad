"""Scans over all text embeddings in blocks, so that memory does not grow with the vocabulary.

Axes: T visual tokens, V vocabulary, D decoder width, n rows of any group.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64, Int

_WORDS_PER_BLOCK = 8192


def blocks(rows: Float[np.ndarray, "n D"]) -> Iterator[tuple[int, Float[np.ndarray, "b D"]]]:
    """Yields the rows in blocks, each with the index of its first row."""
    for start in range(0, len(rows), _WORDS_PER_BLOCK):
        yield start, rows[start : start + _WORDS_PER_BLOCK]


def nearest_words(
    visual: Float[np.ndarray, "T D"], text: Float[np.ndarray, "V D"], *, other: bool = False
) -> tuple[Float64[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Returns the distance of each token to the nearest text embedding, and the index of that embedding.

    Args:
      visual: the tokens.
      text: the text embeddings.
      other: if True, the tokens are rows of `text`, and rows equal to the token are skipped.
    """
    visual = np.asarray(visual, np.float64)
    lowest, indices = np.full(len(visual), np.inf), np.zeros(len(visual), np.int64)
    squares = (visual**2).sum(-1)
    for start, block in blocks(text):
        words = np.asarray(block, np.float64)
        # |a - b|^2 = |a|^2 + |b|^2 - 2ab needs one matrix product per block.
        distances = squares[:, None] + (words**2).sum(-1) - 2 * visual @ words.T
        if other:
            # The squared distance of a token to itself is 0 only up to rounding.
            distances = np.where(distances > 1e-9 * squares[:, None], distances, np.inf)
        nearest = distances.argmin(axis=1)
        distances = distances[np.arange(len(visual)), nearest]
        indices, lowest = np.where(distances < lowest, nearest + start, indices), np.minimum(distances, lowest)
    # The expanded square loses digits to cancellation, so the distance itself is computed from the difference.
    return np.linalg.norm(visual - text[indices], axis=-1), indices


def lowest_products(
    points: Float64[np.ndarray, "T D"], text: Float[np.ndarray, "V D"]
) -> tuple[Float64[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Returns for each point the lowest product with a text embedding, and the index of that embedding."""
    lowest, indices = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for start, block in blocks(text):
        products = points @ np.asarray(block, np.float64).T
        smallest = products.argmin(axis=1)
        products = products[np.arange(len(points)), smallest]
        indices, lowest = np.where(products < lowest, smallest + start, indices), np.minimum(products, lowest)
    return lowest, indices
