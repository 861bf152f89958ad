"""The H-Reducer of DocOwl 1.5: merges `window` neighbours of a row into one token, since text runs along rows.

Axes: B tiles, N features per tile (a square grid of side g), d encoder width, D decoder width, V vocabulary.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput


@dataclasses.dataclass(frozen=True)
class HReducerConfig:
    """Attributes:
    window: features of a row merged into one; a row that it does not divide is padded with zeros (27 -> 28).
    """

    window: int = 4


class HReducerConnector(nn.Module):
    """A 1 x `window` convolution with the same stride over each row, then Linear(d, D)."""

    config: HReducerConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        del text_embedding
        batch, num_features, width = features.shape
        grid, window = math.isqrt(num_features), self.config.window
        rows = features.reshape(batch, grid, grid, width)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -grid % window), (0, 0)))
        # A convolution whose stride equals its width is a Dense layer on each window laid out flat.
        windows = rows.reshape(batch, grid * (rows.shape[2] // window), window * width)
        reduced = layers.Dense(width, ("embed", "mlp"), dtype=self.dtype, name="reduce")(windows)
        return ConnectorOutput(
            layers.Dense(self.output_size, ("mlp", "embed"), dtype=self.dtype, name="project")(reduced)
        )
