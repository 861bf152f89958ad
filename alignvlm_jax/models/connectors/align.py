"""ALIGN: maps each visual feature to a distribution over the LLM's vocabulary, and that to its mean text embedding.

    P  = softmax(LN_V(W2 · LN_D(W1 f)))        distribution over the V words
    F' = P · E_text                            a point in the convex hull of the text embeddings

Axes: B tiles, N features per tile, d encoder width, D decoder width, V vocabulary, k words kept by pruning.
Source: arXiv 2502.01341, section 3.
Forward FLOPs of a tile: N (2dD + 2DV + 2VD) for W1, the logits and the expected embedding.

W2 starts as a copy of the LM head and is a separate parameter afterwards. E_text is the decoder's own embedding table,
so gradients reach it through the connector, too.

This is attention with queries LN_D(W1 f), keys W2 and values E_text, and it is computed as such:
`ops/vocabulary_attention.py` passes over the words in blocks and never holds P. For frozen weights, the collection
"vocabulary" may hold "statistics", the mean and covariance of the rows of W2 (`inference/vocabulary.py` computes them).
LN_V's statistics then need not be computed in every call.

A model may be pruned to the words that it uses (`kept_words`, `inference/vocabulary.py`). W2 and LN_V's parameters then
have k rows. Three more parameters are frozen permanently and keep their dtypes (`EXACT`):

    word_ids         [k]     the words that the rows belong to
    key_mean         [D]     mean of the rows that LN_V takes its statistics from
    key_covariance   [D, D]  covariance of these rows

By default, these are all rows before pruning, so that pruning does not change the scores of the kept words.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from alignvlm_jax.errors import UserError
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.registry import ConnectorConfig, ConnectorShape, ConnectorSpec
from alignvlm_jax.models.flop_counts import TrainedParts, product_flops
from alignvlm_jax.models.weight_table import Row, layer_norm_rows, linear_rows
from alignvlm_jax.ops.vocabulary_attention import VocabularySummary, vocabulary_attention, vocabulary_usage
from alignvlm_jax.ops.vocabulary_statistics import VocabularyStatistics


@dataclasses.dataclass(frozen=True)
class AlignConfig(ConnectorConfig):
    """Settings of ALIGN that the paper leaves open.

    Attributes:
      vocab_scale_init: initial value of LN_V's learned scale. LN_V fixes the variance of the logits, so the scale alone
        decides how concentrated P is at the start: at 1, with unstructured weights, P is nearly uniform and F' nearly
        constant.
      use_bias: whether W1 has a bias.
      layer_norm_eps: epsilon of both LayerNorms.
      vocab_size: number of words that P ranges over; None means all rows of the embedding table. Set it to the LLM's
        original vocabulary if special tokens were added after it.
      kept_words: k, if the model is pruned to that many words; None means all words.
    """

    vocab_scale_init: float = 2.0
    use_bias: bool = True
    layer_norm_eps: float = 1e-5
    vocab_size: int | None = None
    kept_words: int | None = None


EXACT = {"word_ids": "int32", "key_mean": "float32", "key_covariance": "float32"}
"""Parameters of a pruned connector that keep these dtypes, regardless of the dtype of the weights."""


class AlignConnector(nn.Module):
    """ALIGN connector. `log_distribution` returns P itself, for analyses of small inputs."""

    config: AlignConfig
    output_size: int
    dtype: str = "float32"

    @ordinary_modes()
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        """Returns the visual tokens of tiles, and the entropy of each P."""
        tokens, summary = self.describe(features, text_embedding)
        return ConnectorOutput(tokens, summary.entropy)

    @ordinary_modes()
    def describe(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"], top_k: int = 0
    ) -> tuple[Float[Array, "B N D"], VocabularySummary]:
        """Returns the visual tokens, and the entropy and the `top_k` most probable words of each P.

        The words are ids of the embedding table, also in a pruned model.
        """
        query, keys, scale, bias = self.query_and_keys(features, text_embedding)
        tokens, summary = vocabulary_attention(
            query,
            keys,
            scale,
            bias,
            self.values(text_embedding),
            eps=self.config.layer_norm_eps,
            statistics=self.statistics(),
            entropy=True,
            top_k=top_k,
            mesh_axes=layers.vocabulary_mesh(),
        )
        if top_k and self.config.kept_words is not None:
            # Turn rows of the pruned W2 into ids of the embedding table.
            summary = summary.replace(top_ids=self._parameter("word_ids")[summary.top_ids])
        return tokens, summary

    @nn.compact
    def query_and_keys(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "V D"], Float[Array, " V"], Float[Array, " V"]]:
        """Returns LN_D(W1 f) [B, N, D], W2 [V, D], and LN_V's scale and bias [V]."""
        config, width = self.config, self.output_size
        hidden = layers.Dense(width, ("embed", "embed_out"), config.use_bias, self.dtype, name="w1")(features)
        query = layers.LayerNorm(config.layer_norm_eps, name="hidden_norm")(hidden)

        # LN_V is part of `vocabulary_attention`, so only its parameters are declared here.
        vocab_size = _num_words(config, text_embedding.shape[0])
        keys = layers.param(self, "w2", nn.initializers.normal(0.02), ("vocab", "embed"), (vocab_size, width))
        scale_init = nn.initializers.constant(config.vocab_scale_init)
        scale = layers.param(self, "vocab_norm_scale", scale_init, ("vocab",), (vocab_size,))
        bias = layers.param(self, "vocab_norm_bias", nn.initializers.zeros, ("vocab",), (vocab_size,))
        if config.kept_words is not None:
            # Placeholders, whose values come from the pruned checkpoint.
            self.param("word_ids", nn.with_logical_partitioning(_first_words, (None,)), vocab_size)
            layers.param(self, "key_mean", nn.initializers.zeros, (None,), (width,))
            layers.param(self, "key_covariance", nn.initializers.zeros, (None, None), (width, width))
        return query, keys, scale, bias

    def values(self, text_embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """Returns the embeddings of the words that P ranges over. Call `query_and_keys` first."""
        if self.config.kept_words is not None:
            return jnp.take(text_embedding, self._parameter("word_ids"), axis=0)
        return text_embedding[: self.config.vocab_size]

    def statistics(self) -> VocabularyStatistics | None:
        """Returns the statistics of the rows of W2, or None if they are not known. Call `query_and_keys` first."""
        if self.config.kept_words is not None:
            return VocabularyStatistics(self._parameter("key_mean"), self._parameter("key_covariance"))
        return self.get_variable("vocabulary", "statistics")

    def _parameter(self, name: str) -> Array:
        return nn.meta.unbox(self.get_variable("params", name))

    def log_distribution(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]
    ) -> Float[Array, "B N V"]:
        """Returns log P for every feature and word, float32."""
        query, keys, scale, bias = self.query_and_keys(features, text_embedding)
        logits = jnp.dot(query, keys.T.astype(query.dtype), preferred_element_type=jnp.float32)
        eps, statistics = self.config.layer_norm_eps, self.statistics()
        # A pruned model has only some of the logits, but LN_V's statistics cover all words.
        if statistics is None:
            mean, variance = jnp.mean(logits, axis=-1), jnp.var(logits, axis=-1)
        else:
            mean, variance, _ = statistics.moments(query)
        rate = jax.lax.rsqrt(variance + eps)
        scores = (logits - mean[..., None]) * rate[..., None] * scale + bias
        return jax.nn.log_softmax(scores, axis=-1)

    def usage(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"], weights: Float[Array, "B N"]
    ) -> Float[Array, " V"]:
        """Returns the sum over features of weight * P."""
        query_and_keys = self.query_and_keys(features, text_embedding)
        return vocabulary_usage(
            *query_and_keys, weights=weights, eps=self.config.layer_norm_eps, statistics=self.statistics()
        )


def _first_words(rng: PRNGKeyArray, number: int) -> Int[Array, " k"]:
    del rng
    return jnp.arange(number, dtype=jnp.int32)


def _num_words(config: AlignConfig, vocab_size: int) -> int:
    """Returns the number of words that P ranges over, given the rows of the embedding table."""
    return config.kept_words or config.vocab_size or vocab_size


def _token_grid(config: AlignConfig, shape: ConnectorShape) -> tuple[int, int]:
    return shape.grid_size, shape.grid_size


def _flops(config: AlignConfig, shape: ConnectorShape, trained: TrainedParts) -> float:
    # Count the dense form over the full vocabulary, even for a pruned model.
    words, width = config.vocab_size or shape.vocab_size, shape.output_width
    # The values are the decoder's embeddings, so they are trained with the decoder and not with the connector.
    mixture = product_flops(2 * words * width, weights=trained.language, inputs=trained.before_decoder)
    query = trained.first_product(2 * shape.source_width * width)
    return shape.num_features * (query + trained.later_product(2 * width * words) + mixture)


def _weight_rows(config: AlignConfig, shape: ConnectorShape) -> tuple[Row, ...]:
    rows = (
        *linear_rows("w1", "w1", bias=config.use_bias),
        *layer_norm_rows("hidden_norm", "hidden_norm"),
        Row("w2", "w2.weight"),
        Row("vocab_norm_scale", "vocab_norm.weight"),
        Row("vocab_norm_bias", "vocab_norm.bias"),
    )
    if config.kept_words is None:
        return rows
    return (
        *rows,
        Row("word_ids", "word_ids"),
        Row("key_mean", "key_statistics.mean"),
        Row("key_covariance", "key_statistics.covariance"),
    )


def _check(config: AlignConfig, shape: ConnectorShape) -> None:
    if config.kept_words is not None and config.kept_words <= 0:
        raise UserError(f"config.model.connector.kept_words: expected more than 0, got {config.kept_words}")


def _seed(config: AlignConfig, shape: ConnectorShape, head: Float[Array, "V D"]) -> dict[str, Array]:
    """Returns W2 as a copy of the LM head."""
    rows = _num_words(config, shape.vocab_size)
    # Two parameters must not share a buffer: a training step could donate it only once. The tree map keeps the box
    # with the logical axes that may be around the head.
    return {"w2": jax.tree.map(lambda table: jnp.array(table[:rows], copy=True), head)}


SPEC = ConnectorSpec(
    name="align",
    title="ALIGN",
    description="ALIGN: it maps every visual feature to a distribution over the language model's vocabulary, and the "
    "visual token is the expected text embedding under this distribution (arXiv 2502.01341)",
    config=AlignConfig,
    module=AlignConnector,
    token_grid=_token_grid,
    flops=_flops,
    weight_rows=_weight_rows,
    check=_check,
    seeded=("w2",),
    seed=_seed,
    exact_dtypes=EXACT,
    removed_settings={"num_extra_words": 0},
)
