"""The MLP connector of LLaVA-1.5: Linear, GELU, Linear on each feature.

Axes: B tiles, N features per tile, d encoder width, D decoder width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """LLaVA-1.5's `mlp2x_gelu`: both layers have the decoder's width and a bias."""


class MLPConnector(nn.Module):
    """`Linear(D, D)(GELU(Linear(d, D)(features)))` with the exact GELU."""

    config: MLPConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        del text_embedding  # an MLP may put a feature anywhere: that is what ALIGN forbids itself
        hidden = layers.Dense(self.output_size, ("embed", "mlp"), dtype=self.dtype, name="linear_in")(features)
        hidden = nn.gelu(hidden, approximate=False)
        return ConnectorOutput(
            layers.Dense(self.output_size, ("mlp", "embed"), dtype=self.dtype, name="linear_out")(hidden)
        )
