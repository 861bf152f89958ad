"""Where visual tokens lie among the text embeddings: in the plane that shows both best, and beside their convex hull.

Axes: T visual tokens, V vocabulary, D decoder width, S vertices of a face, E edges of it.

ALIGN's tokens are mixtures of text embeddings and so lie in their convex hull; an MLP's may lie anywhere. Whether one
does is not assumed here but measured, for any connector alike, by the distance to the nearest text embedding and to the
hull itself.

A distance to the hull is a minimum over all mixtures, found by Wolfe's algorithm (Finding the nearest point in a
polytope, 1976), which goes from face to face. It is not trusted blindly: with x the best point so far and t the token,

    |x - t|                                        is an upper bound: x is in the hull
    min over words v of (x - t)·(e_v - t) / |x - t|  is a lower bound: the whole hull is behind that plane

so a token is called outside only where a plane separates it from all words, inside only where a mixture meets it, and
undecided where the steps ran out in between.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from tqdm import tqdm

from alignvlm_jax.analysis import output, subjects
from alignvlm_jax.analysis.subjects import Record, connect, encode, tile_batches
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM

PAGES = 20
TOKENS = 1000
HULL_TOKENS = 64
HULL_STEPS = 300
TOLERANCE = 1e-3
"""Of the text embeddings' spread: what is nearer to the hull than that is in it."""

_WORDS_AT_ONCE = 8192
_DRAWN_WORDS = 3000
_REFINEMENTS = 6

_Inverse = Float64[np.ndarray, "E E"] | None
"""Of the products of a face's E edges from its first vertex, to be refined by; None where it is not known."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane in which text embeddings and visual tokens, weighted alike, vary most.

    Attributes:
      text: the text embeddings in it.
      visual: the visual tokens in it.
      explained: share of the variance of each group that lies in it, text first.
    """

    text: Float64[np.ndarray, "V 2"]
    visual: Float64[np.ndarray, "T 2"]
    explained: tuple[float, float]


def principal_plane(text: Float[np.ndarray, "V D"], visual: Float[np.ndarray, "T D"]) -> Plane:
    """PCA of both groups together, each with half of the weight however many it has; float64."""
    means = [np.mean(group, axis=0, dtype=np.float64) for group in (text, visual)]
    origin = (means[0] + means[1]) / 2
    scatters = [_scatter(group, origin) for group in (text, visual)]
    axes = np.linalg.eigh(scatters[0] + scatters[1])[1][:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # an eigenvector's sign is anybody's choice
    explained = []
    for scatter, mean in zip(scatters, means, strict=True):
        covariance = scatter - np.outer(mean - origin, mean - origin)
        explained.append(float(np.trace(axes.T @ covariance @ axes) / max(np.trace(covariance), 1e-300)))
    return Plane(_project(text, origin, axes), _project(visual, origin, axes), (explained[0], explained[1]))


def _project(
    group: Float[np.ndarray, "n D"], origin: Float64[np.ndarray, " D"], axes: Float64[np.ndarray, "D 2"]
) -> Float64[np.ndarray, "n 2"]:
    starts = range(0, len(group), _WORDS_AT_ONCE)
    return np.concatenate([(group[start : start + _WORDS_AT_ONCE] - origin) @ axes for start in starts])


def _scatter(group: Float[np.ndarray, "n D"], origin: Float64[np.ndarray, " D"]) -> Float64[np.ndarray, "D D"]:
    total = np.zeros((len(origin),) * 2)
    for start in range(0, len(group), _WORDS_AT_ONCE):
        centred = group[start : start + _WORDS_AT_ONCE] - origin
        total += centred.T @ centred
    return total / len(group)


def nearest_words(
    visual: Float[np.ndarray, "T D"], text: Float[np.ndarray, "V D"], *, other: bool = False
) -> tuple[Float64[np.ndarray, " T"], np.ndarray]:
    """Distance to the nearest text embedding, and which one it is; memory T x 8192.

    Args:
      visual: the tokens.
      text: the embeddings.
      other: the tokens are rows of `text` themselves: the nearest one that lies elsewhere.
    """
    visual = np.asarray(visual, np.float64)
    best, which = np.full(len(visual), np.inf), np.zeros(len(visual), np.int64)
    squares = (visual**2).sum(-1)
    for start in range(0, len(text), _WORDS_AT_ONCE):
        words = np.asarray(text[start : start + _WORDS_AT_ONCE], np.float64)
        found = squares[:, None] + (words**2).sum(-1) - 2 * visual @ words.T
        if other:
            found = np.where(found > 1e-9 * squares[:, None], found, np.inf)
        nearest = found.argmin(axis=1)
        found = found[np.arange(len(visual)), nearest]
        which, best = np.where(found < best, nearest + start, which), np.minimum(found, best)
    return np.linalg.norm(visual - text[which], axis=-1), which


@dataclasses.dataclass(frozen=True)
class HullDistances:
    """Distances of tokens to the convex hull of the text embeddings.

    Attributes:
      lower: proven by a separating plane; 0 where there is none.
      upper: of the best mixture found.
    """

    lower: Float64[np.ndarray, " T"]
    upper: Float64[np.ndarray, " T"]


def hull_distances(
    visual: Float[np.ndarray, "T D"], text: Float[np.ndarray, "V D"], *, max_steps: int = HULL_STEPS
) -> HullDistances:
    """Wolfe's algorithm for each token; a step costs V x D multiplications a token.

    Args:
      visual: the tokens.
      text: the vertices.
      max_steps: words looked up for a token; those that take more have bounds that are apart.
    """
    visual = np.asarray(visual, np.float64)
    _, start = nearest_words(visual, text)
    faces = [_Face(text[word] - token) for word, token in zip(start, visual, strict=True)]
    lower = np.zeros(len(visual))
    scale = max(np.abs(text).max(), 1e-300)
    open_tokens = list(range(len(visual)))
    for _ in tqdm(range(max_steps), desc="hull", unit="step", dynamic_ncols=True, leave=None):
        if not open_tokens:
            break
        points = np.stack([faces[token].point for token in open_tokens])
        products, words = _lowest_products(points, text)
        remaining = []
        for token, point, product, word in zip(open_tokens, points, products, words, strict=True):
            length = np.linalg.norm(point)
            behind = product - point @ visual[token]  # of the word that is farthest towards the token
            if length > 1e-12 * scale:
                lower[token] = max(lower[token], behind / length)
            # What is left to gain, beside what rounding may be.
            if length <= 1e-9 * scale or length**2 - behind <= 1e-9 * length * scale:
                continue
            if not faces[token].add(text[word] - visual[token]):
                continue
            remaining.append(token)
        open_tokens = remaining
    upper = np.array([np.linalg.norm(face.point) for face in faces])
    return HullDistances(np.minimum(lower, upper), upper)


class _Face:
    """The simplex that the nearest point lies in so far: its vertices, relative to the token, and their weights.

    A step changes a vertex or two, so the inverse products of its edges are kept and brought up to date. That is not
    only fewer multiplications: BLAS would give each of these small problems to several threads, which where cores are
    busy takes several times as long (`einsum` does not).
    """

    def __init__(self, vertex: Float64[np.ndarray, " D"]):
        self._take(vertex[None], np.ones(1), np.zeros((0, 0)))

    def _take(
        self, vertices: Float64[np.ndarray, "S D"], weights: Float64[np.ndarray, " S"], inverse: _Inverse
    ) -> None:
        self.vertices, self.weights, self._inverse = vertices, weights, inverse
        self.point = np.einsum("s,sd->d", weights, vertices)

    def add(self, vertex: Float64[np.ndarray, " D"]) -> bool:
        """Takes in a vertex and moves to the point nearest 0 of what they span; False if that came no nearer."""
        previous, before = (self.vertices, self.weights, self._inverse), np.linalg.norm(self.point)
        inverse = _with_edge(self._inverse, self.vertices[1:] - self.vertices[0], vertex - self.vertices[0])
        vertices, weights = np.concatenate([self.vertices, vertex[None]]), np.append(self.weights, 0.0)
        while True:
            wanted, inverse = _affine_weights(vertices, inverse)
            if (wanted > 1e-12).all():
                break
            # Towards it as far as no weight becomes negative; the vertex whose weight is then 0 is left behind.
            falling = wanted <= 1e-12
            ratios = weights[falling] / np.maximum(weights[falling] - wanted[falling], 1e-300)
            step = min(1.0, ratios.min())
            weights = (1 - step) * weights + step * wanted
            stays = weights > 1e-12
            stays[np.flatnonzero(falling)[ratios.argmin()]] = False
            if not stays.any():
                return False
            vertices, weights = vertices[stays], weights[stays] / weights[stays].sum()
            inverse = _without_edges(inverse, stays[1:]) if stays[0] else None
        self._take(vertices, wanted, inverse)
        if np.linalg.norm(self.point) < before:
            return True
        self._take(*previous)
        return False


def _with_edge(inverse: _Inverse, edges: Float64[np.ndarray, "E D"], edge: Float64[np.ndarray, " D"]) -> _Inverse:
    """The inverse products of edges once there is one more, behind the others."""
    if inverse is None:
        return None
    along = np.einsum("ef,f->e", inverse, np.einsum("ed,d->e", edges, edge))
    apart = edge - np.einsum("e,ed->d", along, edges)
    square = (apart**2).sum()
    if square <= 1e-12 * (edge**2).sum():
        return None
    border = np.append(-along, 1.0)
    return np.pad(inverse, (0, 1)) + np.outer(border, border) / square


def _without_edges(inverse: _Inverse, stays: np.ndarray) -> _Inverse:
    """The inverse products of those edges that stay."""
    while inverse is not None and not stays.all():
        left = int(np.flatnonzero(~stays)[0])
        column, square = np.delete(inverse[left], left), inverse[left, left]
        inverse = np.delete(np.delete(inverse, left, 0), left, 1) - np.outer(column, column / square)
        stays = np.delete(stays, left)
    return inverse


def _affine_weights(
    vertices: Float64[np.ndarray, "S D"], inverse: _Inverse
) -> tuple[Float64[np.ndarray, " S"], _Inverse]:
    """Weights, of any sign and with sum 1, of the point nearest 0 in the plane through the vertices.

    Returns them with the inverse products that did: those given, if with them the edges come to be orthogonal to the
    point, new ones else, and none where the edges are too near to dependent for any (least squares does it then).
    """
    edges = vertices[1:] - vertices[0]
    orthogonal = 1e-13 * np.linalg.norm(edges, axis=1) * np.linalg.norm(vertices[0])
    for found in (inverse, None):
        if found is None:
            try:
                found = np.linalg.inv(edges @ edges.T)
            except np.linalg.LinAlgError:
                break
        along = np.zeros(len(edges))
        for _ in range(_REFINEMENTS):
            slopes = np.einsum("ed,d->e", edges, vertices[0] + np.einsum("e,ed->d", along, edges))
            if (np.abs(slopes) <= orthogonal).all():
                return np.concatenate([[1 - along.sum()], along]), found
            along = along - np.einsum("ef,f->e", found, slopes)
    along = np.linalg.lstsq(edges.T, -vertices[0], rcond=None)[0]
    return np.concatenate([[1 - along.sum()], along]), None


def _lowest_products(
    points: Float64[np.ndarray, "T D"], text: Float[np.ndarray, "V D"]
) -> tuple[Float64[np.ndarray, " T"], np.ndarray]:
    """For each point the lowest product with a text embedding, and whose it is."""
    best, which = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for start in range(0, len(text), _WORDS_AT_ONCE):
        found = points @ np.asarray(text[start : start + _WORDS_AT_ONCE], np.float64).T
        lowest = found.argmin(axis=1)
        found = found[np.arange(len(points)), lowest]
        which, best = np.where(found < best, lowest + start, which), np.minimum(found, best)
    return best, which


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a checkpoint's visual tokens lie.

    Attributes:
      plane: text embeddings and tokens drawn.
      nearest: distance of each token to the nearest text embedding.
      hull: distances of some of the tokens to the hull.
      spread: root mean square distance of text embeddings to their mean: the unit that distances are shown in.
      between_words: median distance of a text embedding to the nearest other one.
    """

    plane: Plane
    nearest: Float64[np.ndarray, " T"]
    hull: HullDistances
    spread: float
    between_words: float

    @property
    def outside(self) -> float:
        """Share of the tokens that are outside the hull, each proven by a plane."""
        return float((self.hull.lower > TOLERANCE * self.spread).mean())

    @property
    def inside(self) -> float:
        """Share of the tokens that a mixture of text embeddings meets."""
        return float((self.hull.upper <= TOLERANCE * self.spread).mean())

    def to_json(self) -> dict[str, Any]:
        def quartiles(distances):
            return [round(float(value), 6) for value in np.quantile(distances / self.spread, (0.25, 0.5, 0.75))]

        return {
            "tokens": len(self.nearest),
            "text_spread": round(self.spread, 6),
            "between_words": round(self.between_words / self.spread, 6),
            "nearest_word_quartiles": quartiles(self.nearest),
            "hull_tokens": len(self.hull.upper),
            "hull_distance_upper_quartiles": quartiles(self.hull.upper),
            "hull_distance_lower_quartiles": quartiles(self.hull.lower),
            "outside_hull": round(self.outside, 4),
            "inside_hull": round(self.inside, 4),
            "undecided": round(1 - self.outside - self.inside, 4),
            "text_variance_in_plane": round(self.plane.explained[0], 4),
            "visual_variance_in_plane": round(self.plane.explained[1], 4),
        }


def geometry(
    reader: Reader,
    records: Sequence[Record],
    *,
    pages: int = PAGES,
    tokens: int = TOKENS,
    hull_tokens: int = HULL_TOKENS,
    seed: int = 0,
) -> Geometry:
    """Measures where visual tokens lie; for any connector.

    Costs one pass of encoder and connector over the pages, `tokens` x V x D multiplications for the nearest words and
    up to `HULL_STEPS` times `hull_tokens` x V x D for the hull, on the host.

    Args:
      reader: the model.
      records: documents.
      pages: how many of the first are looked at.
      tokens: how many of their visual tokens, drawn at random.
      hull_tokens: for how many of those the distance to the hull is found.
      seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    text = np.asarray(reader.generator.variables["params"]["language"]["embedding"], np.float32)
    visual = visual_tokens(reader, records, pages)
    visual = visual[np.sort(rng.permutation(len(visual))[:tokens])]
    words = text[np.sort(rng.permutation(len(text))[:_DRAWN_WORDS])]
    plane = principal_plane(text, visual)
    drawn = dataclasses.replace(plane, text=plane.text[np.sort(rng.permutation(len(text))[:_DRAWN_WORDS])])
    nearest, _ = nearest_words(visual, text)
    between, _ = nearest_words(words, text, other=True)
    spread = float(np.sqrt(np.trace(_scatter(text, np.mean(text, axis=0, dtype=np.float64)))))
    hull = hull_distances(visual[rng.permutation(len(visual))[:hull_tokens]], text)
    return Geometry(drawn, nearest, hull, spread, float(np.median(between)))


def visual_tokens(reader: Reader, records: Sequence[Record], pages: int) -> Float[np.ndarray, "T D"]:
    """All visual tokens of the first pages, float32; those of tiles without any picture left out."""
    model, variables = AlignVLM(reader.config), reader.generator.variables
    found = []
    for tiles, valid_hw in tile_batches(reader, records, pages, title="tokens"):
        tokens = np.asarray(connect(model, variables, encode(model, variables, tiles, valid_hw)), np.float32)
        found.append(tokens[valid_hw[0, :, 0] > 0].reshape(-1, tokens.shape[-1]))
    return np.concatenate(found)


def run(
    checkpoints: Sequence[str],
    data: str,
    out: str,
    *,
    split: str = "heldout",
    pages: int = PAGES,
    tokens: int = TOKENS,
    hull_tokens: int = HULL_TOKENS,
    seed: int = 0,
) -> None:
    """`alignvlm analyze geometry`: measures each checkpoint and writes OUT/geometry.json, .md and .png."""
    output.check_folder(out)
    records = subjects.open_records(data, split)
    found = {
        name: geometry(reader, records, pages=pages, tokens=tokens, hull_tokens=hull_tokens, seed=seed)
        for name, reader in subjects.load_readers(checkpoints)
    }
    figures = {
        "checkpoints": dict(zip(found, map(str, checkpoints), strict=True)),
        "data": str(data),
        "split": split,
        "pages": pages,
        "seed": seed,
        "unit": "distances are in units of text_spread",
        "geometry": {name: entry.to_json() for name, entry in found.items()},
    }
    output.write(out, "geometry", figures=figures, pictures={"geometry": draw(found)}, text=describe(found, split))


def draw(found: Mapping[str, Geometry]):
    """A plane for each checkpoint, and how the distances are distributed."""
    figure, panels = output.picture(len(found) + 1, title="Visual tokens among the text embeddings")
    distances = panels[-1]
    for number, (name, entry) in enumerate(found.items()):
        axes, plane = panels[number], entry.plane
        text, visual = plane.text / entry.spread, plane.visual / entry.spread
        rings = {"s": 9, "marker": "o", "facecolors": "none", "edgecolors": "#999999", "linewidths": 0.6}
        axes.scatter(*text.T, **rings, label="text embeddings")
        axes.scatter(*visual.T, s=9, marker="x", color="#000000", linewidths=0.7, label=f"visual tokens, {name}")
        axes.set_xlabel("first principal axis (spreads of the text)")
        axes.set_ylabel("second principal axis (spreads of the text)")
        axes.legend(fontsize=8)
        style = {key: value for key, value in output.line_style(number).items() if key in ("color", "linestyle")}
        for values, label, width in (
            (entry.nearest, f"{name}, to the nearest word", 1.6),
            (entry.hull.upper, f"{name}, to the hull", 0.8),
        ):
            ordered, shares = np.sort(values / entry.spread), np.arange(1, len(values) + 1) / len(values)
            distances.step(ordered, 100 * shares, where="post", label=label, linewidth=width, **style)
    distances.set_xlabel("distance (spreads of the text)")
    distances.set_ylabel("visual tokens that are nearer (%)")
    distances.legend(fontsize=8)
    return figure


def describe(found: Mapping[str, Geometry], split: str) -> str:
    """What the picture shows, in words."""
    lines = ["# Geometry", "", "![](geometry.png)", ""]
    for name, entry in found.items():
        nearest, upper, lower = (
            np.median(values) / entry.spread for values in (entry.nearest, entry.hull.upper, entry.hull.lower)
        )
        undecided = 1 - entry.inside - entry.outside
        lines += [
            f"**{name}**: of {len(entry.nearest):,} visual tokens of split {split!r}, half lie nearer than "
            f"{nearest:.3f} to a text embedding, in units of the text embeddings' own spread (half of these lie nearer "
            f"than {entry.between_words / entry.spread:.3f} to another one). Of {len(entry.hull.upper)} tokens "
            f"{100 * entry.outside:.0f} % are outside the convex hull of the text embeddings, each proven by a plane, "
            f"{100 * entry.inside:.0f} % are a mixture of them, to within {TOLERANCE:g}"
            + (f", and {100 * undecided:.0f} % were not decided" if undecided > 1e-9 else "")
            + f"; the median distance to the hull is {lower:.3f} to {upper:.3f}. The plane shows "
            f"{100 * entry.plane.explained[0]:.0f} % of the variance of the text embeddings and "
            f"{100 * entry.plane.explained[1]:.0f} % of that of the visual tokens.",
            "",
        ]
    return "\n".join(lines)
