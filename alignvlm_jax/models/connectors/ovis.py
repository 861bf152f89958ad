"""Ovis connector: maps each feature to a distribution over learned visual words, and that to their mean embedding.

    z = softmax(LayerNorm(Linear(d, K) f)),   token = z · table,   table in R^(K x D) learned from scratch

Axes: B tiles, N features per tile, d encoder width, K visual words, D decoder width, V vocabulary.
Forward FLOPs of a tile: N (2dK + 2KD).
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.registry import ConnectorConfig, ConnectorShape, ConnectorSpec
from alignvlm_jax.models.flop_counts import TrainedParts
from alignvlm_jax.models.weight_table import Row, layer_norm_rows, linear_rows
from alignvlm_jax.ops.vocabulary_attention import vocabulary_attention


@dataclasses.dataclass(frozen=True)
class OvisConfig(ConnectorConfig):
    """Settings of the Ovis connector.

    Attributes:
      num_words: K, visual words; Ovis1.6 has 65536.
      layer_norm_eps: epsilon of the LayerNorm over the words.
    """

    num_words: int = 65536
    layer_norm_eps: float = 1e-5


class OvisConnector(nn.Module):
    """Ovis connector, computed like ALIGN but over a table of visual words instead of the decoder's vocabulary."""

    config: OvisConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    @ordinary_modes()
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        """Returns the visual tokens of tiles, and the entropy of each distribution over visual words."""
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
        # As in ALIGN, but the queries are the features themselves: W1 and LN_D have no counterpart here.
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


def _token_grid(config: OvisConfig, shape: ConnectorShape) -> tuple[int, int]:
    return shape.grid_size, shape.grid_size


def _flops(config: OvisConfig, shape: ConnectorShape, trained: TrainedParts) -> float:
    return shape.num_features * (
        trained.first_product(2 * shape.source_width * config.num_words)
        + trained.later_product(2 * config.num_words * shape.output_width)
    )


def _weight_rows(config: OvisConfig, shape: ConnectorShape) -> tuple[Row, ...]:
    return (
        *linear_rows("head", "head", bias=False),
        *layer_norm_rows("word_norm", "word_norm"),
        Row("table", "table.weight"),
    )


SPEC = ConnectorSpec(
    name="ovis",
    title="Ovis",
    description="a distribution over a separate visual vocabulary and its expected embedding, as in Ovis",
    config=OvisConfig,
    module=OvisConnector,
    token_grid=_token_grid,
    flops=_flops,
    weight_rows=_weight_rows,
)
