"""Measures the position of visual tokens: their principal plane, and distances to words and to the hull.

Axes: T visual tokens, V vocabulary, D decoder width, n rows of any group.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from alignvlm_jax.analysis.geometry.hull import HullDistances, hull_distances
from alignvlm_jax.analysis.geometry.words import blocks, nearest_words
from alignvlm_jax.analysis.inputs import Record, connect, encode, tile_batches
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM

PAGES = 20
TOKENS = 1000
HULL_TOKENS = 64
TOLERANCE = 1e-3
"""Distance, in units of the text embeddings' spread, below which a token counts as inside the hull."""

_PLOTTED_WORDS = 3000


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane in which text embeddings and visual tokens, weighted equally, vary most.

    Attributes:
      text: coordinates of the text embeddings.
      visual: coordinates of the visual tokens.
      explained: share of the variance of each group that lies in the plane, text first.
    """

    text: Float64[np.ndarray, "V 2"]
    visual: Float64[np.ndarray, "T 2"]
    explained: tuple[float, float]


def principal_plane(text: Float[np.ndarray, "V D"], visual: Float[np.ndarray, "T D"]) -> Plane:
    """Runs PCA on both groups together in float64. Each group has half of the weight, regardless of its size."""
    means = [np.mean(group, axis=0, dtype=np.float64) for group in (text, visual)]
    origin = (means[0] + means[1]) / 2
    # Each scatter is a mean over its group, so both groups have the same weight.
    scatters = [_scatter(group, origin) for group in (text, visual)]
    # `eigh` returns the eigenvalues in ascending order: the principal axes are the last two columns, in reverse.
    axes = np.linalg.eigh(scatters[0] + scatters[1])[1][:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # the sign of an eigenvector is arbitrary
    explained = []
    for scatter, mean in zip(scatters, means, strict=True):
        # From moments about the common origin to moments about the mean of the group.
        covariance = scatter - np.outer(mean - origin, mean - origin)
        explained.append(float(np.trace(axes.T @ covariance @ axes) / max(np.trace(covariance), 1e-300)))
    return Plane(_project(text, origin, axes), _project(visual, origin, axes), (explained[0], explained[1]))


def _project(
    group: Float[np.ndarray, "n D"], origin: Float64[np.ndarray, " D"], axes: Float64[np.ndarray, "D 2"]
) -> Float64[np.ndarray, "n 2"]:
    return np.concatenate([(block - origin) @ axes for _, block in blocks(group)])


def _scatter(group: Float[np.ndarray, "n D"], origin: Float64[np.ndarray, " D"]) -> Float64[np.ndarray, "D D"]:
    """Returns the second moments of the group about `origin`."""
    total = np.zeros((len(origin),) * 2)
    for _, block in blocks(group):
        centered = block - origin
        total += centered.T @ centered
    return total / len(group)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Position of a checkpoint's visual tokens.

    Attributes:
      plane: the text embeddings and tokens that are plotted.
      nearest: distance of each token to the nearest text embedding.
      hull: distances of some of the tokens to the hull.
      spread: root mean square distance of the text embeddings to their mean; the unit of the reported distances.
      between_words: median distance of a text embedding to the nearest other one.
    """

    plane: Plane
    nearest: Float64[np.ndarray, " T"]
    hull: HullDistances
    spread: float
    between_words: float

    @property
    def outside(self) -> float:
        """Share of the tokens outside the hull, each proven by a plane."""
        return float((self.hull.lower > TOLERANCE * self.spread).mean())

    @property
    def inside(self) -> float:
        """Share of the tokens that a mixture of text embeddings meets."""
        return float((self.hull.upper <= TOLERANCE * self.spread).mean())

    @property
    def undecided(self) -> float:
        """Share of the tokens for which the steps ran out before a decision."""
        return 1 - self.outside - self.inside


@ordinary_modes()
def measure_geometry(
    reader: Reader,
    records: Sequence[Record],
    *,
    pages: int = PAGES,
    tokens: int = TOKENS,
    hull_tokens: int = HULL_TOKENS,
    seed: int = 0,
) -> Geometry:
    """Measures the position of visual tokens; works for any connector.

    The cost is one pass of encoder and connector over the pages and, on the host, `tokens` x V x D multiplications for
    the nearest words and at most `hull.MAX_STEPS` x `hull_tokens` x V x D for the hull.

    Args:
      reader: the model.
      records: documents.
      pages: number of pages, from the first.
      tokens: number of their visual tokens, drawn at random.
      hull_tokens: number of those tokens whose distance to the hull is computed.
      seed: seed of the draws.
    """
    # Draw visual tokens, and words for the distances between words.
    rng = np.random.default_rng(seed)
    text = np.asarray(reader.generator.variables["params"]["language"]["embedding"], np.float32)
    visual = visual_tokens(reader, records, pages)
    visual = visual[np.sort(rng.permutation(len(visual))[:tokens])]
    words = text[np.sort(rng.permutation(len(text))[:_PLOTTED_WORDS])]
    # The plane comes from all text embeddings, but only some of them are plotted.
    plane = principal_plane(text, visual)
    plotted = dataclasses.replace(plane, text=plane.text[np.sort(rng.permutation(len(text))[:_PLOTTED_WORDS])])
    # Distances: to words, between words, and to the hull.
    nearest, _ = nearest_words(visual, text)
    between, _ = nearest_words(words, text, other=True)
    spread = float(np.sqrt(np.trace(_scatter(text, np.mean(text, axis=0, dtype=np.float64)))))
    hull = hull_distances(visual[rng.permutation(len(visual))[:hull_tokens]], text)
    return Geometry(plotted, nearest, hull, spread, float(np.median(between)))


def visual_tokens(reader: Reader, records: Sequence[Record], pages: int) -> Float[np.ndarray, "T D"]:
    """Returns all visual tokens of the first pages in float32, except tokens of padding tiles."""
    model, variables = AlignVLM(reader.config), reader.generator.variables
    all_tokens = []
    for tiles, valid_hw in tile_batches(reader, records, pages, title="tokens"):
        # Tiles of valid height 0 pad the batch.
        tokens = np.asarray(connect(model, variables, encode(model, variables, tiles, valid_hw)), np.float32)
        all_tokens.append(tokens[valid_hw[0, :, 0] > 0].reshape(-1, tokens.shape[-1]))
    return np.concatenate(all_tokens)
