"""The Ovis connector: a distribution over visual words of its own, and their expected embedding.

    z = softmax(LayerNorm(Linear(d, K) f)),   token = z · table,   table in R^(K x D) learned from scratch

Axes: B tiles, N features per tile, d encoder width, K visual words, D decoder width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.ops.vocabulary_attention import vocabulary_attention


@dataclasses.dataclass(frozen=True)
class OvisConfig:
    """Attributes:
    num_words: K, visual words; Ovis1.6 has 65536.
    layer_norm_eps: epsilon of the LayerNorm over the words.
    """

    num_words: int = 65536
    layer_norm_eps: float = 1e-5


class OvisConnector(nn.Module):
    """ALIGN's nearest relative, and computed like it; the words are the connector's own, not the LLM's."""

    config: OvisConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        del text_embedding
        config, num_words = self.config, self.config.num_words
        head = layers.Parameters(name="head")(
            kernel=(layers.fan_in_init, ("embed", "vocab"), (features.shape[-1], num_words))
        )
        norm = layers.Parameters(name="word_norm")(
            scale=(nn.initializers.ones, ("norm",), (num_words,)), bias=(nn.initializers.zeros, ("norm",), (num_words,))
        )
        table = layers.param(
            self, "table", nn.initializers.normal(0.02), ("vocab", "embed"), (num_words, self.output_size)
        )
        tokens, summary = vocabulary_attention(
            features.astype(self.dtype),
            head["kernel"].T,
            norm["scale"],
            norm["bias"],
            table,
            eps=config.layer_norm_eps,
            entropy=True,
            mesh_axes=layers.vocabulary_mesh(),
        )
        return ConnectorOutput(tokens, summary.entropy)
