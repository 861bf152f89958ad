"""A few learned words beside the vocabulary: what ALIGN may say where no word of the LLM's says it.

    n  = log sum_v exp(s_v)                  over the V words (`ops/vocabulary_attention.py` gives it)
    s'_j = q·k_j + b_j                       scores of the k words of the connector's own; no LayerNorm over so few
    g  = sum_j exp(s'_j) / (exp(n) + sum_j exp(s'_j))
    F' = (1 - g) P · E_text + g softmax(s') · U

That is one softmax over V + k words, with values [E_text; U]: F' lies in the convex hull of the text embeddings and of
the k learned vectors U, which begin in it. So the output stays bounded, and near the hull, as an MLP's does not.

Each begins as the twin of a word of the vocabulary, with its embedding and about its score: so it is in use from the
first step on (a word that begins anywhere else has no share in a P that is decided, and without a share no gradient),
and what the connector says is hardly changed by it. Twins then part: U is learned for pictures alone, E_text also for
text.

Axes: B tiles, N features per tile, D decoder width, k words of the connector's own, V vocabulary.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.ops.vocabulary_attention import VocabularySummary


@flax.struct.dataclass
class ExtraWords:
    """The parameters, float32."""

    keys: Float[Array, "k D"]
    bias: Float[Array, " k"]
    values: Float[Array, "k D"]

    @classmethod
    def declare(cls, number: int, width: int) -> "ExtraWords":
        """Declared inside a compact method; `seed` gives them their values once the vocabulary is known."""
        normal, axes = nn.initializers.normal(0.02), ("position", "embed")
        parameters = layers.Parameters(name="extra_words")(
            keys=(normal, axes, (number, width)),
            bias=(nn.initializers.zeros, ("position",), (number,)),
            values=(normal, axes, (number, width)),
        )
        return cls(**parameters)

    def scores(self, query: Float[Array, "... D"]) -> Float[Array, "... k"]:
        """s', float32."""
        return jnp.dot(query, self.keys.T.astype(query.dtype), preferred_element_type=jnp.float32) + self.bias

    def share(self, query: Float[Array, "... D"], log_normalizer: Float[Array, "..."]) -> Float[Array, "..."]:
        """g, float32."""
        return nn.sigmoid(jax.nn.logsumexp(self.scores(query), axis=-1) - log_normalizer)

    def join(
        self, query: Float[Array, "... D"], mixed: Float[Array, "... D"], summary: VocabularySummary
    ) -> tuple[Float[Array, "... D"], VocabularySummary]:
        """F', and what is said of the joint distribution.

        Args:
          query: q.
          mixed: P · E_text over the vocabulary alone.
          summary: of that P, with its normaliser and its entropy.
        """
        scores = self.scores(query)
        total = jax.nn.logsumexp(scores, axis=-1)
        p = jnp.exp(scores - total[..., None])
        ahead = total - summary.log_normalizer
        share = nn.sigmoid(ahead)[..., None]
        own = jnp.dot(p.astype(query.dtype), self.values.astype(query.dtype), preferred_element_type=jnp.float32)
        tokens = (1 - share) * mixed.astype(jnp.float32) + share * own

        share, ahead, own_entropy = jax.lax.stop_gradient((share[..., 0], ahead, total - jnp.sum(p * scores, axis=-1)))
        # softplus: -log(1 - g) and -log g.
        entropy = (1 - share) * (summary.entropy + nn.softplus(ahead)) + share * (own_entropy + nn.softplus(-ahead))
        summary = summary.replace(log_normalizer=jnp.logaddexp(summary.log_normalizer, total), entropy=entropy)
        if summary.top_probabilities is not None:
            summary = summary.replace(top_probabilities=(1 - share)[..., None] * summary.top_probabilities)
        return tokens.astype(mixed.dtype), summary


def seed(
    number: int, keys: Float[Array, "V D"], embedding: Float[Array, "V D"], vocab_scale: Float[Array, ""] | float
) -> dict[str, Float[Array, "..."]]:
    """The parameters to begin with: twins of the first k words. Tokenizers number words from the commonest on.

    A key is the word's, taken from the mean of all and scaled, so that it scores about as LN_V would make it: with q of
    unit variance the logits' standard deviation is sqrt(tr C), C the covariance of the keys.

    Args:
      number: k.
      keys: W2.
      embedding: E_text, of the same words.
      vocab_scale: LN_V's scale.
    """
    centred = keys - jnp.mean(keys, axis=0)
    deviation = jnp.sqrt(jnp.mean(jnp.sum(centred**2, axis=-1)))
    words = np.arange(number) % keys.shape[0]
    return {
        "keys": vocab_scale / deviation * centred[words],
        "bias": jnp.zeros(number, keys.dtype),
        "values": embedding[words],
    }
