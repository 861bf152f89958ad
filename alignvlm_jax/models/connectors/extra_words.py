"""A few learned words beside the vocabulary: what ALIGN may say where no word of the LLM's says it.

    mu, r, n        mean and inverse deviation of the V words' logits, and log sum_v exp(s_v): from LN_V and the softmax
                    over the vocabulary (`ops/vocabulary_attention.py`)
    s'_j = gamma_j r (q·k_j - mu) + beta_j         scores of the k words of the connector's own
    g  = sum_j exp(s'_j) / (exp(n) + sum_j exp(s'_j))
    F' = (1 - g) P · E_text + g softmax(s') · U

That is one softmax over V + k words, with values [E_text; U]: F' lies in the convex hull of the text embeddings and of
the k learned vectors U, which begin in it. So the output stays bounded, and near the hull, as an MLP's does not. LN_V's
mean and variance remain those of the vocabulary, so what is known of W2 (cached statistics, pruning) stays true.

Each begins as the twin of a word of the vocabulary, with its key, its embedding and an eighth of its weight: so it is
in use from the first step on (a word that begins anywhere else has no share in a P that is decided, and without a share
no gradient), and what the connector says is hardly changed by it. Twins then part: U is learned for pictures alone,
E_text also for text.

Axes: B tiles, N features per tile, D decoder width, k words of the connector's own, V vocabulary.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.ops.vocabulary_attention import VocabularySummary

_WEIGHT = 1 / 8  # of a new word, relative to its twin


@flax.struct.dataclass
class ExtraWords:
    """The parameters, float32."""

    keys: Float[Array, "k D"]
    scale: Float[Array, " k"]
    bias: Float[Array, " k"]
    values: Float[Array, "k D"]

    @classmethod
    def declare(cls, number: int, width: int, scale_init: float) -> "ExtraWords":
        """Declared inside a compact method; `seed` gives them their values once the vocabulary is known."""
        normal, table = nn.initializers.normal(0.02), ("position", "embed")
        parameters = layers.Parameters(name="extra_words")(
            keys=(normal, table, (number, width)),
            scale=(nn.initializers.constant(scale_init), ("position",), (number,)),
            bias=(nn.initializers.zeros, ("position",), (number,)),
            values=(normal, table, (number, width)),
        )
        return cls(**parameters)

    def scores(
        self, query: Float[Array, "... D"], mean: Float[Array, "..."], rate: Float[Array, "..."]
    ) -> Float[Array, "... k"]:
        """s', float32, from mu and r."""
        logits = jnp.dot(query, self.keys.T.astype(query.dtype), preferred_element_type=jnp.float32)
        return (logits - mean[..., None]) * rate[..., None] * self.scale + self.bias

    def join(
        self, query: Float[Array, "... D"], mixed: Float[Array, "... D"], summary: VocabularySummary
    ) -> tuple[Float[Array, "... D"], VocabularySummary]:
        """F', and what is said of the joint distribution.

        Args:
          query: q.
          mixed: P · E_text over the vocabulary alone.
          summary: of that P, with its normalizers and its entropy.
        """
        scores, ahead = self._scores_and_lead(query, summary)
        p = jax.nn.softmax(scores, axis=-1)
        share = nn.sigmoid(ahead)[..., None]
        own = jnp.dot(p.astype(query.dtype), self.values.astype(query.dtype), preferred_element_type=jnp.float32)
        tokens = (1 - share) * mixed.astype(jnp.float32) + share * own

        p, scores, share, ahead = jax.lax.stop_gradient((p, scores, share[..., 0], ahead))
        own_entropy = jax.nn.logsumexp(scores, axis=-1) - jnp.sum(p * scores, axis=-1)
        # softplus: -log(1 - g) and -log g.
        entropy = (1 - share) * (summary.entropy + nn.softplus(ahead)) + share * (own_entropy + nn.softplus(-ahead))
        summary = summary.replace(normalizers=None, entropy=entropy)  # they were the vocabulary's alone
        if summary.top_probabilities is not None:
            summary = summary.replace(top_probabilities=(1 - share)[..., None] * summary.top_probabilities)
        return tokens.astype(mixed.dtype), summary

    def share(self, query: Float[Array, "... D"], summary: VocabularySummary) -> Float[Array, "..."]:
        """g, float32."""
        return nn.sigmoid(self._scores_and_lead(query, summary)[1])

    def _scores_and_lead(self, query, summary):
        """s', and log(g / (1 - g))."""
        found = summary.normalizers
        scores = self.scores(query, found.mean, found.rate)
        return scores, jax.nn.logsumexp(scores, axis=-1) - found.log_sum


def seed(
    number: int,
    keys: Float[Array, "V D"],
    scale: Float[Array, " V"],
    bias: Float[Array, " V"],
    embedding: Float[Array, "V D"],
) -> dict[str, Float[Array, "..."]]:
    """The parameters to begin with: twins of the first k words. Tokenizers number words from the commonest on.

    Args:
      number: k.
      keys: W2.
      scale: of LN_V.
      bias: of LN_V.
      embedding: E_text, of the same words.
    """
    words = np.arange(number) % keys.shape[0]
    return {
        "keys": keys[words],
        "scale": scale[words],
        "bias": bias[words] + math.log(_WEIGHT),
        "values": embedding[words],
    }
