"""Measures scores and distances under noise on the vision features, and scores on corrupted pages.

Axes: M tiles in a batch, N visual tokens per tile, D decoder width, o origins.

Gaussian noise is added to the features just before the connector, as in the paper (arXiv 2502.01341, mean 0, sigma 3).
Two quantities are measured: the loss of score, and the movement of the connector's output. The movement is the cosine
distance 1 - cos between each visual token and itself without noise, averaged over the tokens of non-empty tiles.

A large vector that all tokens share makes every such distance small. The distances are therefore measured from three
origins:

    plain      the zero vector, as in the paper
    centered   the mean text embedding; this also hides movement if all visual tokens lie far from it on one side
    tokens     the mean visual token without noise; this leaves the part that differs between patches

Sigma has the unit of the features, which differs between encoders: sigma 3 may drown the features of one encoder and
barely change those of another. `feature_deviation`, the spread of the features themselves, gives the scale.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignvlm_jax.analysis.inputs import Record, connect, encode, tile_batches
from alignvlm_jax.analysis.noise.corruptions import DEFAULT_CORRUPTIONS, CorruptedRecords, Corruption
from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.evaluation.runner import evaluate
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.models.feature_noise import FeatureNoise

SIGMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
_PAGES = 50


@dataclasses.dataclass(frozen=True)
class NoisePoint:
    """Effect of feature noise of one strength.

    Attributes:
      sigma: standard deviation of the noise, in the unit of the features.
      relative_sigma: `sigma` divided by the standard deviation of the features.
      tally: right answers and questions.
      cosine_distance: mean over visual tokens of 1 - cos(token, token without noise), as in the paper.
      centred_cosine_distance: the same after the mean text embedding is subtracted from both tokens.
      token_centred_cosine_distance: the same after the mean visual token is subtracted from both tokens.
    """

    sigma: float
    relative_sigma: float
    tally: Tally
    cosine_distance: float
    centred_cosine_distance: float
    token_centred_cosine_distance: float

    @property
    def score(self) -> float:
        """Share of questions answered with an exact match."""
        return self.tally.exact_match

    @property
    def questions(self) -> int:
        """Number of questions asked."""
        return self.tally.total

    def to_json(self) -> dict[str, Any]:
        """Returns the point as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tally = fields.pop("tally")
        return {**{name: round(value, 6) for name, value in fields.items()}, **tally.to_json()}


@dataclasses.dataclass(frozen=True)
class CorruptionPoint:
    """Score on pages with one corruption.

    Attributes:
      corruption: kind and level of the corruption.
      tally: right answers and questions.
    """

    corruption: Corruption
    tally: Tally

    def to_json(self) -> dict[str, Any]:
        """Returns the point as JSON values."""
        return {**dataclasses.asdict(self.corruption), **self.tally.to_json()}


@dataclasses.dataclass(frozen=True)
class Distances:
    """Movement of visual tokens under noise, and spread of the features without noise.

    Attributes:
      by_sigma: for each sigma the mean cosine distances from the three origins, in the order of the module docstring.
      feature_deviation: standard deviation of the features about their mean, root mean square over the dimensions.
      num_tokens: number of visual tokens that the means cover.
    """

    by_sigma: list[tuple[float, float, float]]
    feature_deviation: float
    num_tokens: int


@ordinary_modes()
def feature_noise(
    reader: Reader,
    records: Sequence[Record],
    sigmas: Sequence[float] = SIGMAS,
    *,
    limit: int | None = None,
    seed: int = 0,
    pages: int = _PAGES,
) -> list[NoisePoint]:
    """Scores a reader under noise on its features; works for any connector.

    The cost is one evaluation of `limit` questions per sigma, two passes of encoder and connector over `pages` pages,
    and one more pass of the connector per sigma. No array of size visual tokens x vocabulary is allocated.

    Args:
      reader: the model, on one device.
      records: documents with questions.
      sigmas: standard deviations of the noise; 0 is the unchanged reader.
      limit: if set, only the first `limit` questions are asked.
      seed: seed of the noise. All sigmas scale the same noise.
      pages: number of pages, from the first, on which distances are measured.
    """
    distances = feature_distances(reader, records, sigmas, seed=seed, pages=pages)
    points = []
    for sigma, sigma_distances in zip(sigmas, distances.by_sigma, strict=True):
        # Sigma 0 is the reader itself, whose program has no noise in it.
        noisy = reader.with_feature_noise(sigma, seed) if sigma else reader
        report = evaluate(noisy, records, limit=limit, title=f"noise of sigma {sigma:g}")
        points.append(NoisePoint(sigma, sigma / distances.feature_deviation, report.overall, *sigma_distances))
    return points


def feature_distances(
    reader: Reader, records: Sequence[Record], sigmas: Sequence[float], *, seed: int = 0, pages: int = _PAGES
) -> Distances:
    """Measures only the distances, without asking questions; takes the arguments of `feature_noise`."""
    model, variables = AlignVLM(reader.config), reader.generator.variables
    width = variables["params"]["language"]["embedding"].shape[1]

    # First pass, without noise: moments of the features and the mean visual token, in float64.
    token_sum, moments = np.zeros(width), np.zeros((2, reader.config.vision.hidden_size))
    num_tokens = num_features = 0
    for tiles, valid_hw in tile_batches(reader, records, pages, title="features"):
        is_real = valid_hw[0, :, 0] > 0  # excludes the padding of the last batch
        features = encode(model, variables, tiles, valid_hw)
        feature_rows = np.asarray(features, np.float64)[is_real].reshape(-1, features.shape[-1])
        token_rows = np.asarray(connect(model, variables, features), np.float64)[is_real].reshape(-1, width)
        moments += [feature_rows.sum(0), (feature_rows**2).sum(0)]
        token_sum += token_rows.sum(0)
        num_features, num_tokens = num_features + len(feature_rows), num_tokens + len(token_rows)
    mean, mean_square = moments / num_features
    text_mean = np.asarray(jnp.mean(variables["params"]["language"]["embedding"], axis=0, dtype=jnp.float32))
    origins = np.stack([np.zeros(width), text_mean, token_sum / num_tokens]).astype(np.float32)

    # Second pass: the distances at every sigma from the tokens without noise, seen from the three origins. Features are
    # computed again, because the features of all pages may not fit in memory.
    sums = np.zeros((len(sigmas), len(origins)))
    for tiles, valid_hw in tile_batches(reader, records, pages, title="distances"):
        is_real = valid_hw[0, :, 0] > 0
        features = encode(model, variables, tiles, valid_hw)
        clean = connect(model, variables, features)
        for number, sigma in enumerate(sigmas):
            noisy = connect(model, variables, FeatureNoise.create(sigma, seed).add_to(features, jnp.asarray(tiles)))
            sums[number] += np.asarray(_cosine_distances(clean, noisy, origins))[:, is_real].sum((1, 2))
    by_sigma = [tuple(row) for row in (sums / num_tokens).tolist()]
    # Rounding can make the mean variance of constant features slightly negative.
    return Distances(by_sigma, math.sqrt(max(0.0, (mean_square - mean**2).mean())), num_tokens)


@jax.jit
def _cosine_distances(
    left: Float[Array, "M N D"], right: Float[Array, "M N D"], origins: Float[Array, "o D"]
) -> Float[Array, "o M N"]:
    # [M, N, D] - [o, 1, 1, D] -> [o, M, N, D]
    left, right = (tokens.astype(jnp.float32) - origins[:, None, None] for tokens in (left, right))
    lengths = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
    return 1.0 - jnp.sum(left * right, axis=-1) / jnp.maximum(lengths, 1e-30)


@ordinary_modes()
def image_noise(
    reader: Reader,
    records: Sequence[Record],
    corruptions: Sequence[Corruption] = DEFAULT_CORRUPTIONS,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[CorruptionPoint]:
    """Scores a reader on corrupted pages. The cost is one evaluation of `limit` questions per corruption."""
    points = []
    for corruption in corruptions:
        title = f"{corruption.kind} {corruption.level:g}"
        report = evaluate(reader, CorruptedRecords(records, corruption, seed), limit=limit, title=title)
        points.append(CorruptionPoint(corruption, report.overall))
    return points
