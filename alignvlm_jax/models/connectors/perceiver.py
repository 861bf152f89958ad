"""Perceiver resampler of Idefics2: a fixed number of learned latents attends to the features.

Axes: B tiles, N features per tile, R latents, d encoder width, I width of the gated MLP in front, D decoder width, V
vocabulary, H query heads, G key-value heads, h head width.

It follows transformers' `Idefics2Connector`: a gated MLP d -> D, then `depth` layers in which the latents attend to the
features and to themselves, each with RMSNorm and a gated MLP, and a final RMSNorm.

Forward FLOPs of a tile: N · 2 (2dI + ID) + depth · (2 (2RDHh + 2(N+R)DGh + 12RD²) + 4R (N+R) Hh).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.registry import ConnectorConfig, ConnectorShape, ConnectorSpec
from alignvlm_jax.models.flop_counts import TrainedParts, product_flops
from alignvlm_jax.models.language import GatedMLP
from alignvlm_jax.models.weight_table import Row, linear_rows
from alignvlm_jax.ops.attention import cached_attention


@dataclasses.dataclass(frozen=True)
class PerceiverConfig(ConnectorConfig):
    """Settings of the Perceiver resampler. The defaults follow Idefics2.

    Attributes:
      num_latents: R, the number of visual tokens per tile.
      depth: number of layers.
      num_heads: H.
      num_kv_heads: G.
      head_dim: h.
      intermediate_size: width of the gated MLP in front; None means four times the decoder's width.
      rms_norm_eps: epsilon of every RMSNorm.
    """

    num_latents: int = 64
    depth: int = 3
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 96
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-6


class PerceiverConnector(nn.Module):
    """Maps the N features of a tile to `num_latents` tokens."""

    config: PerceiverConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    @ordinary_modes()
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        """Returns the visual tokens of tiles."""
        del text_embedding
        config, width = self.config, self.output_size
        inner = config.intermediate_size or 4 * width
        context = GatedMLP(inner, width, self.dtype, name="modality_projection")(features)
        latents = layers.param(
            self, "latents", nn.initializers.normal(1.0), ("position", "embed"), (config.num_latents, width)
        )
        # All tiles start with the same latents.
        latents = jnp.broadcast_to(latents.astype(self.dtype), (features.shape[0], *latents.shape))
        for index in range(config.depth):
            latents = PerceiverLayer(config, width, self.dtype, name=f"layer_{index}")(latents, context)
        return ConnectorOutput(layers.RMSNorm(config.rms_norm_eps, name="final_norm")(latents))


class PerceiverLayer(nn.Module):
    """Attention of the latents to [features; latents], then a gated MLP of four times their width."""

    config: PerceiverConfig
    width: int
    dtype: str

    @nn.compact
    def __call__(self, latents: Float[Array, "B R D"], context: Float[Array, "B N D"]) -> Float[Array, "B R D"]:
        """Returns the latents after this layer."""
        config = self.config
        queries = layers.RMSNorm(config.rms_norm_eps, name="latents_norm")(latents)
        context = layers.RMSNorm(config.rms_norm_eps, name="context_norm")(context)
        # Keys and values come from the features and from the latents, so the latents also attend to themselves.
        context = jnp.concatenate([context, queries], axis=1)

        def project(inputs, name, num_heads):
            dense = layers.Dense(num_heads * config.head_dim, ("embed", "heads"), False, self.dtype, name=name)
            return dense(inputs).reshape(*inputs.shape[:2], num_heads, config.head_dim)

        # The features are the slots of a cache in which every latent sees everything.
        visible = jnp.ones((1, 1, context.shape[1]), bool)
        attended = cached_attention(
            project(queries, "query", config.num_heads),
            project(context, "key", config.num_kv_heads).transpose(0, 2, 3, 1),
            project(context, "value", config.num_kv_heads).transpose(0, 2, 1, 3),
            visible=visible,
        )
        attended = attended.reshape(*latents.shape[:2], config.num_heads * config.head_dim)
        latents += layers.Dense(self.width, ("heads", "embed"), False, self.dtype, name="out")(attended)
        normed = layers.RMSNorm(config.rms_norm_eps, name="mlp_norm")(latents)
        return latents + GatedMLP(4 * self.width, self.width, self.dtype, name="mlp")(normed)


def _token_grid(config: PerceiverConfig, shape: ConnectorShape) -> tuple[int, int]:
    # Latents have no positions in their tile, so they form one row.
    return 1, config.num_latents


def _flops(config: PerceiverConfig, shape: ConnectorShape, trained: TrainedParts) -> float:
    width, latents = shape.output_width, config.num_latents
    inner = config.intermediate_size or 4 * width
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    context = shape.num_features + latents
    projection = trained.first_product(4 * shape.source_width * inner) + trained.later_product(2 * inner * width)
    linear = 2 * latents * width * queries + 2 * context * width * keys + 12 * latents * width**2
    # Both factors of attention's products are activations.
    needs_gradient = trained.before_decoder
    attention = product_flops(4 * latents * context * queries, weights=needs_gradient, inputs=needs_gradient)
    return shape.num_features * projection + config.depth * (trained.later_product(2 * linear) + attention)


_GATED_MLP = ("gate", "up", "down")


def _weight_rows(config: PerceiverConfig, shape: ConnectorShape) -> tuple[Row, ...]:
    rows = [Row("latents", "latents"), Row("final_norm/scale", "final_norm.weight")]
    for name in _GATED_MLP:
        rows += linear_rows(f"modality_projection/{name}", f"modality_projection.{name}", bias=False)
    # The layers are separate modules and their parameters are not stacked, so each has its own rows.
    for index in range(config.depth):
        path, key = f"layer_{index}", f"layers.{index}"
        for name in ("latents_norm", "context_norm", "mlp_norm"):
            rows.append(Row(f"{path}/{name}/scale", f"{key}.{name}.weight"))
        for name in ("query", "key", "value", "out"):
            rows += linear_rows(f"{path}/{name}", f"{key}.{name}", bias=False)
        for name in _GATED_MLP:
            rows += linear_rows(f"{path}/mlp/{name}", f"{key}.mlp.{name}", bias=False)
    return tuple(rows)


SPEC = ConnectorSpec(
    name="perceiver",
    title="Perceiver",
    description="a Perceiver resampler: a fixed number of learned latents attend to the features, as in Idefics2",
    config=PerceiverConfig,
    module=PerceiverConnector,
    token_grid=_token_grid,
    flops=_flops,
    weight_rows=_weight_rows,
    is_spatial=False,
)
