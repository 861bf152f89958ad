"""ALIGN: each visual feature becomes a distribution over the LLM's vocabulary, and that the expected text embedding.

    P  = softmax(LN_V(W2 · LN_D(W1 f)))        distribution over the V words
    F' = P · E_text                            a point in the convex hull of the text embeddings

Axes: B tiles, N features per tile, d encoder width, D decoder width, V vocabulary, k words kept by pruning.
Source: arXiv 2502.01341, section 3.

W2 starts as a copy of the LM head (`seed_connector` in `models/alignvlm.py` puts it there) and is a parameter of its
own afterwards. E_text is the decoder's live embedding table, so gradients reach it through the connector too.

That is attention with queries LN_D(W1 f), keys W2 and values E_text, and is computed so: `ops/vocabulary_attention.py`
passes over the words in blocks and never holds P. A model whose weights are frozen may bring, as "statistics" in the
collection "vocabulary" (`inference/vocabulary.py` makes it), mean and covariance of the rows of W2: LN_V's statistics
then need not be computed at every call.

A model may be pruned to the words that it uses (`kept_words`, `inference/vocabulary.py`). W2 and LN_V's parameters then
have k rows, and there are three parameters more, which are frozen for good and keep their dtypes (`EXACT`):

    word_ids         [k]     which words the rows are
    key_mean         [D]     the rows that LN_V takes its statistics of, in the main all of those before pruning:
    key_covariance   [D, D]  the logits of the words kept are what they were
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.ops.vocabulary_attention import VocabularySummary, vocabulary_attention, vocabulary_usage
from alignvlm_jax.ops.vocabulary_statistics import VocabularyStatistics


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """What the paper leaves open about ALIGN.

    Attributes:
      vocab_scale_init: initial value of LN_V's learned scale. LN_V fixes the logits' variance, so the scale alone
        decides how decided P is at the start: at 1, with unstructured weights, P is nearly uniform and F' nearly
        constant.
      use_bias: whether W1 has a bias.
      layer_norm_eps: epsilon of both LayerNorms.
      vocab_size: words that P ranges over; None means all rows of the embedding table. Set it to the LLM's original
        vocabulary when special tokens were added behind it.
      kept_words: k, where the model is pruned to so many of those words; None is all of them.
    """

    vocab_scale_init: float = 2.0
    use_bias: bool = True
    layer_norm_eps: float = 1e-5
    vocab_size: int | None = None
    kept_words: int | None = None


EXACT = {"word_ids": "int32", "key_mean": "float32", "key_covariance": "float32"}
"""The parameters of a pruned connector that have these dtypes whatever dtype the weights have."""


class AlignConnector(nn.Module):
    """The connector. `log_distribution` gives P itself, for analyses on small inputs."""

    config: AlignConfig
    output_size: int
    dtype: str = "float32"

    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        tokens, summary = self.describe(features, text_embedding)
        return ConnectorOutput(tokens, summary.entropy)

    def describe(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"], top_k: int = 0
    ) -> tuple[Float[Array, "B N D"], VocabularySummary]:
        """The visual tokens; of each P the entropy and the `top_k` likeliest words, as ids of the embedding table."""
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
            summary = summary.replace(top_ids=self._parameter("word_ids")[summary.top_ids])
        return tokens, summary

    @nn.compact
    def query_and_keys(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "V D"], Float[Array, " V"], Float[Array, " V"]]:
        """LN_D(W1 f) [B, N, D], W2 [V, D], and LN_V's scale and bias [V]."""
        config, width = self.config, self.output_size
        hidden = layers.Dense(width, ("embed", "embed_out"), config.use_bias, self.dtype, name="w1")(features)
        query = layers.LayerNorm(config.layer_norm_eps, name="hidden_norm")(hidden)

        vocab_size = config.kept_words or config.vocab_size or text_embedding.shape[0]
        keys = layers.param(self, "w2", nn.initializers.normal(0.02), ("vocab", "embed"), (vocab_size, width))
        scale_init = nn.initializers.constant(config.vocab_scale_init)
        scale = layers.param(self, "vocab_norm_scale", scale_init, ("vocab",), (vocab_size,))
        bias = layers.param(self, "vocab_norm_bias", nn.initializers.zeros, ("vocab",), (vocab_size,))
        if config.kept_words is not None:
            self.param("word_ids", nn.with_logical_partitioning(_first_words, (None,)), vocab_size)
            layers.param(self, "key_mean", nn.initializers.zeros, (None,), (width,))
            layers.param(self, "key_covariance", nn.initializers.zeros, (None, None), (width, width))
        return query, keys, scale, bias

    def values(self, text_embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """The embeddings of the words that P ranges over; once `query_and_keys` has been called."""
        if self.config.kept_words is not None:
            return jnp.take(text_embedding, self._parameter("word_ids"), axis=0)
        return text_embedding[: self.config.vocab_size]

    def statistics(self) -> VocabularyStatistics | None:
        """Of the rows that LN_V normalises over, if they are known; once `query_and_keys` has been called."""
        if self.config.kept_words is not None:
            return VocabularyStatistics(self._parameter("key_mean"), self._parameter("key_covariance"))
        return self.get_variable("vocabulary", "statistics")

    def _parameter(self, name: str) -> Array:
        return nn.meta.unbox(self.get_variable("params", name))

    def log_distribution(
        self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]
    ) -> Float[Array, "B N V"]:
        """log P for every feature and word, float32."""
        query, keys, scale, bias = self.query_and_keys(features, text_embedding)
        logits = jnp.dot(query, keys.T.astype(query.dtype), preferred_element_type=jnp.float32)
        eps, statistics = self.config.layer_norm_eps, self.statistics()
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
        """Sum over features of weight * P."""
        query_and_keys = self.query_and_keys(features, text_embedding)
        return vocabulary_usage(
            *query_and_keys, weights=weights, eps=self.config.layer_norm_eps, statistics=self.statistics()
        )


def _first_words(rng: PRNGKeyArray, number: int) -> Int[Array, " k"]:
    del rng
    return jnp.arange(number, dtype=jnp.int32)
