"""The Ovis connector: a distribution over visual words of its own, and their expected embedding.

    z = softmax(LayerNorm(Linear(d, K) f)),   token = z · table,   table in R^(K x D) learned from scratch

Axes: B tiles, N features per tile, d encoder width, K visual words, D decoder width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput


@dataclasses.dataclass(frozen=True)
class OvisConfig:
    """Attributes:
    num_words: K, visual words; Ovis1.6 has 65536.
    layer_norm_eps: epsilon of the LayerNorm over the words.
    """

    num_words: int = 65536
    layer_norm_eps: float = 1e-5


class OvisConnector(nn.Module):
    """ALIGN's nearest relative: the words are the connector's own, not the LLM's."""

    config: OvisConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        del text_embedding
        config = self.config
        dense = layers.Dense(config.num_words, ("embed", "vocab"), use_bias=False, dtype=self.dtype, name="head")
        logits = dense(features).astype(jnp.float32)
        logits = layers.LayerNorm(config.layer_norm_eps, name="word_norm")(logits)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        table = layers.param(
            self, "table", nn.initializers.normal(0.02), ("vocab", "embed"), (config.num_words, self.output_size)
        )
        p = jnp.exp(log_p)
        tokens = jnp.dot(p.astype(self.dtype), table.astype(self.dtype))
        return ConnectorOutput(tokens, -jnp.sum(jax.lax.stop_gradient(p * log_p), axis=-1))
