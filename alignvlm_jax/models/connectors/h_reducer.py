"""H-Reducer of DocOwl 1.5: merges `window` neighboring features of a row into one token, since text runs along rows.

Axes: B tiles, N features per tile (a square grid of side g), d encoder width, D decoder width, V vocabulary.
Forward FLOPs of a tile: N' (2wd² + 2dD), with windows of w features and N' visual tokens per tile.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.registry import ConnectorConfig, ConnectorShape, ConnectorSpec
from alignvlm_jax.models.flop_counts import TrainedParts
from alignvlm_jax.models.weight_table import WINDOW_CONV, Row, linear_rows


@dataclasses.dataclass(frozen=True)
class HReducerConfig(ConnectorConfig):
    """Settings of the H-Reducer.

    Attributes:
      window: number of features of a row that are merged into one token. If it does not divide the row, the row is
        padded with zeros (27 -> 28).
    """

    window: int = 4


class HReducerConnector(nn.Module):
    """A 1 x `window` convolution with the same stride over each row, then Linear(d, D)."""

    config: HReducerConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    @ordinary_modes()
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        """Returns the visual tokens of tiles."""
        del text_embedding
        batch, num_features, width = features.shape
        grid, window = math.isqrt(num_features), self.config.window
        rows = features.reshape(batch, grid, grid, width)
        # Pad each row on the right to a multiple of the window.
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -grid % window), (0, 0)))
        # A convolution whose stride equals its width is a Dense layer on each flattened window.
        windows = rows.reshape(batch, grid * (rows.shape[2] // window), window * width)
        reduced = layers.Dense(width, ("embed", "mlp"), dtype=self.dtype, name="reduce")(windows)
        return ConnectorOutput(
            layers.Dense(self.output_size, ("mlp", "embed"), dtype=self.dtype, name="project")(reduced)
        )


def _token_grid(config: HReducerConfig, shape: ConnectorShape) -> tuple[int, int]:
    return shape.grid_size, math.ceil(shape.grid_size / config.window)


def _flops(config: HReducerConfig, shape: ConnectorShape, trained: TrainedParts) -> float:
    width = shape.source_width
    return math.prod(_token_grid(config, shape)) * (
        trained.first_product(2 * config.window * width**2) + trained.later_product(2 * width * shape.output_width)
    )


def _weight_rows(config: HReducerConfig, shape: ConnectorShape) -> tuple[Row, ...]:
    return (
        Row("reduce/kernel", "reduce.weight", WINDOW_CONV),
        Row("reduce/bias", "reduce.bias"),
        *linear_rows("project", "project", bias=True),
    )


SPEC = ConnectorSpec(
    name="h_reducer",
    title="H-Reducer",
    description="a convolution that merges neighboring features of a row, as in DocOwl 1.5",
    config=HReducerConfig,
    module=HReducerConnector,
    token_grid=_token_grid,
    flops=_flops,
    weight_rows=_weight_rows,
)
