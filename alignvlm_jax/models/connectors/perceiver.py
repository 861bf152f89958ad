"""The Perceiver resampler of Idefics2: a fixed number of learned latents reads the features.

Axes: B tiles, N features per tile, R latents, d encoder width, D decoder width, V vocabulary, h head width.

Follows transformers' `Idefics2Connector`: a gated MLP d -> D, then `depth` layers in which the latents attend to the
features and to themselves, each with RMSNorm and a gated MLP, and a final RMSNorm.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.language import GatedMLP
from alignvlm_jax.ops.attention import cached_attention


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Idefics2's defaults; the gated MLP in front is as wide as the decoder's own where `intermediate_size` is None."""

    num_latents: int = 64
    depth: int = 3
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 96
    intermediate_size: int | None = None
    rms_norm_eps: float = 1e-6


class PerceiverConnector(nn.Module):
    """N features in, `num_latents` tokens out."""

    config: PerceiverConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        del text_embedding
        config, width = self.config, self.output_size
        inner = config.intermediate_size or 4 * width
        context = GatedMLP(inner, width, self.dtype, name="modality_projection")(features)
        latents = layers.param(
            self, "latents", nn.initializers.normal(1.0), ("position", "embed"), (config.num_latents, width)
        )
        latents = jnp.broadcast_to(latents.astype(self.dtype), (features.shape[0], *latents.shape))
        for index in range(config.depth):
            latents = PerceiverLayer(config, width, self.dtype, name=f"layer_{index}")(latents, context)
        return ConnectorOutput(layers.RMSNorm(config.rms_norm_eps, name="final_norm")(latents))


class PerceiverLayer(nn.Module):
    """Latents attend to [features; latents], then pass a gated MLP of four times their width."""

    config: PerceiverConfig
    width: int
    dtype: str

    @nn.compact
    def __call__(self, latents: Float[Array, "B R D"], context: Float[Array, "B N D"]) -> Float[Array, "B R D"]:
        config = self.config
        queries = layers.RMSNorm(config.rms_norm_eps, name="latents_norm")(latents)
        context = layers.RMSNorm(config.rms_norm_eps, name="context_norm")(context)
        context = jnp.concatenate([context, queries], axis=1)

        def project(inputs, name, num_heads):
            dense = layers.Dense(num_heads * config.head_dim, ("embed", "heads"), False, self.dtype, name=name)
            return dense(inputs).reshape(*inputs.shape[:2], num_heads, config.head_dim)

        visible = jnp.ones((1, 1, context.shape[1]), bool)
        attended = cached_attention(
            project(queries, "query", config.num_heads),
            project(context, "key", config.num_kv_heads),
            project(context, "value", config.num_kv_heads),
            visible=visible,
        )
        attended = attended.reshape(*latents.shape[:2], config.num_heads * config.head_dim)
        latents += layers.Dense(self.width, ("heads", "embed"), False, self.dtype, name="out")(attended)
        normed = layers.RMSNorm(config.rms_norm_eps, name="mlp_norm")(latents)
        return latents + GatedMLP(4 * self.width, self.width, self.dtype, name="mlp")(normed)
