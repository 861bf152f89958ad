"""Distances to the convex hull of the text embeddings, with proven bounds.

Axes: T visual tokens, V vocabulary, D decoder width, S vertices of a face, E edges of a face from its first vertex.

The distance to the hull is a minimum over all mixtures of text embeddings. Wolfe's algorithm ("Finding the nearest
point in a polytope", 1976) finds it by moving from face to face. The result comes with two bounds. With x the best
point so far and t the token,

    |x - t|                                          is an upper bound, because x is in the hull
    min over words v of (x - t)·(e_v - t) / |x - t|  is a lower bound, because the whole hull is behind that plane

A token is called outside only if a plane separates it from all words, inside only if a mixture meets it, and undecided
if the steps ran out in between.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float64

from alignvlm_jax.analysis.geometry.words import lowest_products, nearest_words
from alignvlm_jax.progress import progress_bar

MAX_STEPS = 300
_REFINEMENTS = 6

_Inverse = Float64[np.ndarray, "E E"] | None
"""Inverse of the matrix of inner products of a face's edges, or None if it is not known."""


@dataclasses.dataclass(frozen=True)
class HullDistances:
    """Bounds of the distances of tokens to the convex hull of the text embeddings.

    Attributes:
      lower: proven by a separating plane; 0 if none was found.
      upper: distance to the best mixture found.
    """

    lower: Float64[np.ndarray, " T"]
    upper: Float64[np.ndarray, " T"]


def hull_distances(
    visual: Float[np.ndarray, "T D"], text: Float[np.ndarray, "V D"], *, max_steps: int = MAX_STEPS
) -> HullDistances:
    """Returns bounds of the distance of each token to the hull.

    Wolfe's algorithm runs for all tokens at once. A step costs V x D multiplications per token.

    Args:
      visual: the tokens.
      text: the vertices of the hull.
      max_steps: maximum number of steps. The bounds of a token that needs more stay apart.
    """
    # Start at the nearest word of each token.
    visual = np.asarray(visual, np.float64)
    _, start = nearest_words(visual, text)
    faces = [_Face(text[word] - token) for word, token in zip(start, visual, strict=True)]
    lower = np.zeros(len(visual))
    scale = max(np.abs(text).max(), 1e-300)
    open_tokens = list(range(len(visual)))
    for _ in progress_bar(range(max_steps), "hull", unit="step", leave=None):
        if not open_tokens:
            break
        # For every open token, find the word that lies farthest towards the token, seen from the best point so far.
        points = np.stack([faces[token].point for token in open_tokens])
        products, words = lowest_products(points, text)
        remaining = []
        for token, point, product, word in zip(open_tokens, points, products, words, strict=True):
            # In the module docstring's terms, `point` is x - t, and `projection` the minimum of (x - t)·(e_v - t).
            length = np.linalg.norm(point)
            projection = product - point @ visual[token]
            if length > 1e-12 * scale:
                lower[token] = max(lower[token], projection / length)
            # Stop when the gap between the bounds is no larger than rounding.
            if length <= 1e-9 * scale or length**2 - projection <= 1e-9 * length * scale:
                continue
            # Also stop when the new word brings the point no nearer, because of rounding.
            if not faces[token].add(text[word] - visual[token]):
                continue
            remaining.append(token)
        open_tokens = remaining
    # Rounding can put the lower bound slightly above the upper one.
    upper = np.array([np.linalg.norm(face.point) for face in faces])
    return HullDistances(np.minimum(lower, upper), upper)


class _Face:
    """The simplex that contains the nearest point so far: its vertices, relative to the token, and their weights.

    A step changes one or two vertices, so the inverse of the edges' inner products is kept and updated. This saves
    multiplications and, above all, calls of BLAS: it would split each of these small problems over several threads,
    which takes several times as long on busy cores. `einsum` does not use threads.
    """

    def __init__(self, vertex: Float64[np.ndarray, " D"]):
        self._set(vertex[None], np.ones(1), np.zeros((0, 0)))

    def _set(self, vertices: Float64[np.ndarray, "S D"], weights: Float64[np.ndarray, " S"], inverse: _Inverse) -> None:
        self.vertices, self.weights, self._inverse = vertices, weights, inverse
        self.point = np.einsum("s,sd->d", weights, vertices)

    def add(self, vertex: Float64[np.ndarray, " D"]) -> bool:
        """Adds a vertex and moves to the point of the new simplex nearest to 0; returns False if that is no nearer."""
        previous, previous_distance = (self.vertices, self.weights, self._inverse), np.linalg.norm(self.point)
        # The new vertex has weight 0 at first, so the point does not move yet.
        inverse = _with_edge(self._inverse, self.vertices[1:] - self.vertices[0], vertex - self.vertices[0])
        vertices, weights = np.concatenate([self.vertices, vertex[None]]), np.append(self.weights, 0.0)
        while True:
            target, inverse = _affine_weights(vertices, inverse)
            if (target > 1e-12).all():
                break
            # Move towards the target until the first weight reaches 0, and drop the vertex of that weight.
            is_falling = target <= 1e-12
            ratios = weights[is_falling] / np.maximum(weights[is_falling] - target[is_falling], 1e-300)
            step = min(1.0, ratios.min())
            weights = (1 - step) * weights + step * target
            is_kept = weights > 1e-12
            is_kept[np.flatnonzero(is_falling)[ratios.argmin()]] = False
            if not is_kept.any():
                return False
            vertices, weights = vertices[is_kept], weights[is_kept] / weights[is_kept].sum()
            # All edges start at the first vertex, so removing it invalidates the inverse.
            inverse = _without_edges(inverse, is_kept[1:]) if is_kept[0] else None
        self._set(vertices, target, inverse)
        if np.linalg.norm(self.point) < previous_distance:
            return True
        self._set(*previous)
        return False


def _with_edge(inverse: _Inverse, edges: Float64[np.ndarray, "E D"], edge: Float64[np.ndarray, " D"]) -> _Inverse:
    """Returns the inverse inner products after appending an edge, or None if it is linearly dependent on the others."""
    if inverse is None:
        return None
    # Block inversion: split the new edge into its part along the old edges and its part orthogonal to them.
    along = np.einsum("ef,f->e", inverse, np.einsum("ed,d->e", edges, edge))
    orthogonal = edge - np.einsum("e,ed->d", along, edges)
    square = (orthogonal**2).sum()
    if square <= 1e-12 * (edge**2).sum():
        return None
    border = np.append(-along, 1.0)
    return np.pad(inverse, (0, 1)) + np.outer(border, border) / square


def _without_edges(inverse: _Inverse, is_kept: Bool[np.ndarray, " E"]) -> _Inverse:
    """Returns the inverse inner products of the edges that are kept."""
    # Edges are removed one by one, each by the inverse of the block inversion in `_with_edge`.
    while inverse is not None and not is_kept.all():
        removed = int(np.flatnonzero(~is_kept)[0])
        column, square = np.delete(inverse[removed], removed), inverse[removed, removed]
        inverse = np.delete(np.delete(inverse, removed, 0), removed, 1) - np.outer(column, column / square)
        is_kept = np.delete(is_kept, removed)
    return inverse


def _affine_weights(
    vertices: Float64[np.ndarray, "S D"], inverse: _Inverse
) -> tuple[Float64[np.ndarray, " S"], _Inverse]:
    """Returns the weights, of any sign and with sum 1, of the point nearest to 0 in the plane through the vertices.

    Also returns the inverse inner products that gave the weights. These are the ones passed in if they make the edges
    orthogonal to the point, and new ones otherwise. They are None if the edges are too close to linearly dependent, in
    which case least squares gives the weights.
    """
    edges = vertices[1:] - vertices[0]
    tolerance = 1e-13 * np.linalg.norm(edges, axis=1) * np.linalg.norm(vertices[0])
    # Rounding errors accumulate in an inverse that was updated many times. If it fails, a new one is computed.
    for candidate in (inverse, None):
        if candidate is None:
            try:
                candidate = np.linalg.inv(edges @ edges.T)
            except np.linalg.LinAlgError:
                break
        # Iterative refinement: correct the weights by the inverse until the residual is down to rounding.
        along = np.zeros(len(edges))
        for _ in range(_REFINEMENTS):
            slopes = np.einsum("ed,d->e", edges, vertices[0] + np.einsum("e,ed->d", along, edges))
            if (np.abs(slopes) <= tolerance).all():
                return np.concatenate([[1 - along.sum()], along]), candidate
            along = along - np.einsum("ef,f->e", candidate, slopes)
    along = np.linalg.lstsq(edges.T, -vertices[0], rcond=None)[0]
    return np.concatenate([[1 - along.sum()], along]), None
