"""Measures how ALIGN uses its words, and the score of models pruned to the most used words.

Axes: V vocabulary, k words kept, M tiles in a batch, N features per tile, d encoder width.

P itself, an array of patches x words, is never allocated: `usage` processes the words in blocks.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from alignvlm_jax.analysis.inputs import Record, encode, page_indices, tile_batches
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.evaluation.runner import evaluate
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inference.vocabulary import Variables, prune_vocabulary
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig, connector_spec
from alignvlm_jax.progress import progress_bar

PAGES = 100
MASSES = (0.9, 0.99, 0.999)
THRESHOLD = 1e-6
Statistics = Literal["full", "kept"]


@dataclasses.dataclass(frozen=True)
class VocabularyUse:
    """ALIGN's use of its words over many patches.

    Attributes:
      mean: P averaged over patches, in the order of the embedding table; 0 for pruned words. Sums to 1.
      effective_per_patch: exp(entropy of P) averaged over patches: the effective number of words of one patch.
      patches: number of patches.
      pages: number of pages.
    """

    mean: Float64[np.ndarray, " V"]
    effective_per_patch: float
    patches: int
    pages: int

    @property
    def shares(self) -> Float64[np.ndarray, " V"]:
        """Share of the mass of each word, the most used first; sums to 1."""
        return np.sort(self.mean)[::-1]

    @property
    def effective_of_mean(self) -> float:
        """Effective number of words of all patches together: exp(entropy of `shares`)."""
        used = self.shares[self.shares > 0]
        return float(np.exp(-(used * np.log(used)).sum()))

    def words_for(self, mass: float) -> int:
        """Returns the smallest number of words that together have the share `mass`."""
        # The small number makes up for rounding in the sum.
        return int(np.searchsorted(np.cumsum(self.shares), mass - 1e-12) + 1)

    def words_above(self, probability: float = THRESHOLD) -> int:
        """Returns the number of words whose mean probability is above `probability`."""
        return int((self.mean > probability).sum())

    def kept_mass(self, k: int) -> float:
        """Returns the share of the mass that the k most used words have together."""
        return float(self.shares[:k].sum())

    def top(self, k: int) -> list[tuple[int, float]]:
        """Returns the k most used words with their mean probabilities."""
        return [(int(word), float(self.mean[word])) for word in np.argsort(-self.mean, kind="stable")[:k]]


def mean_distribution(reader: Reader, records: Sequence[Record], *, pages: int = PAGES) -> Float64[np.ndarray, " V"]:
    """Returns P averaged over the patches of the first `pages` pages; sums to 1.

    The cost is one pass of encoder and connector over the pages.
    """
    return vocabulary_use(reader, records, pages=pages).mean


@ordinary_modes()
def vocabulary_use(reader: Reader, records: Sequence[Record], *, pages: int = PAGES) -> VocabularyUse:
    """Returns the mean distribution with the other measures of P. Patches of padding tiles do not count."""
    config = align_config(reader.config)
    model, variables = AlignVLM(reader.config), reader.generator.variables
    word_sums, effective, patches = 0.0, 0.0, 0
    for tiles, valid_hw in tile_batches(reader, records, pages, title="words"):
        is_real = valid_hw[0, :, 0] > 0
        features = encode(model, variables, tiles, valid_hw)
        usage, entropy = _usage_and_entropy(model, variables, features, jnp.asarray(is_real, jnp.float32))
        # `usage` already has weight 0 on padding; the entropy is selected here.
        entropy = np.asarray(entropy, np.float64)[is_real]
        word_sums = word_sums + np.asarray(usage, np.float64)
        effective, patches = effective + np.exp(entropy).sum(), patches + entropy.size
    # The sum differs from the number of patches by rounding only.
    mean = word_sums / word_sums.sum()
    if config.kept_words is not None:
        # Put the words of a pruned model back in their positions in the full vocabulary.
        kept, mean = mean, np.zeros(reader.config.language.vocab_size)
        mean[np.asarray(variables["params"]["connector"]["word_ids"])] = kept
    return VocabularyUse(mean, float(effective / patches), patches, len(page_indices(records, pages)))


@functools.partial(jax.jit, static_argnames="model")
def _usage_and_entropy(
    model: AlignVLM, variables: Variables, features: Float[Array, "M N d"], weights: Float[Array, " M"]
) -> tuple[Float[Array, " V"], Float[Array, "M N"]]:
    def measure(model: AlignVLM):
        embedding, patch_weights = model.language.embedding, jnp.broadcast_to(weights[:, None], features.shape[:2])
        entropy = model.connector(features, embedding).entropy
        return model.connector.usage(features, embedding, patch_weights), entropy

    return model.apply(variables, method=measure)


def align_config(config: AlignVLMConfig, checkpoint: str | os.PathLike = "the checkpoint") -> AlignConfig:
    """Returns the connector's config.

    Raises:
      UserError: if the connector is not ALIGN.
    """
    if not isinstance(config.connector, AlignConfig):
        name = connector_spec(config.connector).title
        raise UserError(f"{checkpoint}'s connector is {name}: only ALIGN has a distribution over the decoder's words")
    return config.connector


@dataclasses.dataclass(frozen=True)
class VocabularyPoint:
    """The score of a pruned model.

    Attributes:
      words: number of words kept, k.
      statistics: rows from which LN_V takes its mean and variance.
      kept_mass: share of the mass of the mean P that the kept words have.
      tally: right answers and questions.
    """

    words: int
    statistics: Statistics
    kept_mass: float
    tally: Tally

    @property
    def score(self) -> float:
        """Share of questions answered with an exact match."""
        return self.tally.exact_match

    def to_json(self) -> dict[str, Any]:
        """Returns the point as JSON values."""
        fields = {"words": self.words, "statistics": self.statistics, "kept_mass": round(self.kept_mass, 8)}
        return {**fields, **self.tally.to_json()}


def pruned_reader(
    reader: Reader, usage: Float64[np.ndarray, " V"], k: int, *, statistics: Statistics = "full"
) -> Reader:
    """Returns a reader pruned to the k most used words; takes the arguments of `inference.vocabulary.prune_vocabulary`.

    The cost is the statistics of W2, V D^2 multiplications. The first answer compiles a model of a new shape.
    """
    params = reader.generator.variables["params"]
    config, params = prune_vocabulary(reader.config, params, usage, k, statistics=statistics)
    generator = reader.generator
    return Reader(config, params, reader.tokenizer, reader.tiling, batch_size=generator.batch_size, mesh=generator.mesh)


@ordinary_modes()
def vocabulary_curve(
    reader: Reader,
    records: Sequence[Record],
    sizes: Sequence[int],
    *,
    usage: Float64[np.ndarray, " V"],
    limit: int | None = None,
    statistics: Statistics = "full",
) -> list[VocabularyPoint]:
    """Scores the reader pruned to each of `sizes` words. The size of the whole vocabulary stands for the reader itself.

    The cost per size is one evaluation of `limit` questions and the compilation of a model of another shape.

    Args:
      reader: the full model; a pruned model can only be scored as it is.
      records: documents with questions.
      sizes: numbers of words to keep.
      usage: from `mean_distribution`, measured on other pages.
      limit: if set, only the first `limit` questions are asked.
      statistics: rows from which LN_V takes mean and variance, as for `inference.vocabulary.prune_vocabulary`.
    """
    shares = np.sort(usage / usage.sum())[::-1]
    num_words = align_config(reader.config).kept_words or len(usage)
    points = []
    for size in progress_bar(sizes, "pruned", unit="model", leave=None):
        pruned = reader if size == num_words else pruned_reader(reader, usage, size, statistics=statistics)
        report = evaluate(pruned, records, limit=limit, title=f"{size:,} words")
        points.append(VocabularyPoint(size, statistics, float(shares[:size].sum()), report.overall))
    return points


def default_sizes(use: VocabularyUse) -> list[int]:
    """Returns the default sizes of a curve.

    These are the numbers of words that carry `MASSES`, the smallest of them halved three times, the number of words
    above `THRESHOLD`, and the whole vocabulary. Sizes close to the whole vocabulary are skipped.
    """
    fewest, num_words = use.words_for(MASSES[0]), len(use.mean)
    sizes = {use.words_above(), *(use.words_for(mass) for mass in MASSES), *(fewest // part for part in (2, 4, 8))}
    return sorted({num_words} | {size for size in sizes if 0 < size < 0.95 * num_words})
