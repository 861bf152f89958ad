"""MLP connector of LLaVA-1.5: Linear, GELU and Linear, applied to each feature.

Axes: B tiles, N features per tile, d encoder width, D decoder width, V vocabulary.
Forward FLOPs of a tile: N (2dD + 2D²).
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Float

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.registry import ConnectorConfig, ConnectorShape, ConnectorSpec
from alignvlm_jax.models.flop_counts import TrainedParts
from alignvlm_jax.models.weight_table import Row, linear_rows


@dataclasses.dataclass(frozen=True)
class MLPConfig(ConnectorConfig):
    """Settings of LLaVA-1.5's `mlp2x_gelu`, which has none: both layers have the decoder's width and a bias."""


class MLPConnector(nn.Module):
    """`Linear(D, D)(GELU(Linear(d, D)(features)))` with the exact GELU."""

    config: MLPConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    @ordinary_modes()
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        """Returns the visual tokens of tiles."""
        # Unlike ALIGN's, the outputs of an MLP are not confined to the convex hull of the text embeddings.
        del text_embedding
        hidden = layers.Dense(self.output_size, ("embed", "mlp"), dtype=self.dtype, name="linear_in")(features)
        hidden = nn.gelu(hidden, approximate=False)
        return ConnectorOutput(
            layers.Dense(self.output_size, ("mlp", "embed"), dtype=self.dtype, name="linear_out")(hidden)
        )


def _token_grid(config: MLPConfig, shape: ConnectorShape) -> tuple[int, int]:
    return shape.grid_size, shape.grid_size


def _flops(config: MLPConfig, shape: ConnectorShape, trained: TrainedParts) -> float:
    width = shape.output_width
    return shape.num_features * (
        trained.first_product(2 * shape.source_width * width) + trained.later_product(2 * width**2)
    )


def _weight_rows(config: MLPConfig, shape: ConnectorShape) -> tuple[Row, ...]:
    return (*linear_rows("linear_in", "linear_in", bias=True), *linear_rows("linear_out", "linear_out", bias=True))


SPEC = ConnectorSpec(
    name="mlp",
    title="MLP",
    description="an MLP of two linear layers with GELU, applied to each feature, as in LLaVA-1.5",
    config=MLPConfig,
    module=MLPConnector,
    token_grid=_token_grid,
    flops=_flops,
    weight_rows=_weight_rows,
)
