"""SigLIP vision transformer, which maps a tile to one feature per patch.

Axes: B tiles, S tile side in pixels, p patch side in pixels, N patches (features) per tile, d encoder width.

It follows transformers' `SiglipVisionTransformer` without the pooling head: the features are `last_hidden_state`, after
the final LayerNorm. The paper does not state which layer its connector reads; the Ovis recipe that it builds on reads
this one.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt8

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import hardware, layers, rematerialization
from alignvlm_jax.ops.attention import packed_attention
from alignvlm_jax.ops.checkpoint_names import MLP_IN, QKV


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Settings of the encoder. The defaults are SigLIP So400m/14 at 384 px, the paper's encoder.

    Attributes:
      image_size: S, in pixels.
      patch_size: p, in pixels.
      hidden_size: d.
      intermediate_size: width of the MLPs.
      num_layers: number of transformer blocks.
      num_heads: attention heads of each block.
      layer_norm_eps: epsilon of every LayerNorm.
      remat: values that the backward pass keeps instead of recomputing them: "none", "full", "auto", or a list such as
        "attention_out,qkv"; see `rematerialization.py`.
      dtype: dtype of the arithmetic; "auto" is bfloat16 on accelerators and float32 on CPUs (`models/hardware.py`).
      attention: attention kernel, one of `ops.attention.KERNELS`; "auto" is the fastest on the device.
    """

    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    layer_norm_eps: float = 1e-6
    remat: str | tuple[str, ...] = rematerialization.NONE
    dtype: str = "auto"
    attention: str = "auto"

    def __post_init__(self):
        """Writes `remat` as one string."""
        object.__setattr__(self, "remat", rematerialization.canonical(self.remat))

    @property
    def grid_size(self) -> int:
        """Number of patches along one side of a tile. SigLIP drops the remainder: 384 // 14 = 27."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the number of patches (and of visual features) per tile."""
        return self.grid_size**2


def normalize_tiles(tiles: UInt8[Array, "*b S S 3"], valid_hw: Int[Array, "*b 2"]) -> Float[Array, "*b S S 3"]:
    """Maps pixels to [-1, 1] as SigLIP does, and everything outside the image to exactly 0.

    Args:
      tiles: pixels, with the image in the top left corner.
      valid_hw: height and width of the image in each tile.
    """
    # No pixel value maps to 0, because 127.5 is not an integer. Padding therefore differs from every color.
    side = tiles.shape[-2]
    rows = jnp.arange(side) < valid_hw[..., 0:1]
    columns = jnp.arange(side) < valid_hw[..., 1:2]
    is_inside = rows[..., :, None, None] & columns[..., None, :, None]
    return jnp.where(is_inside, tiles.astype(jnp.float32) / 127.5 - 1.0, 0.0)


def extract_patches(tiles: Float[Array, "B S S 3"], patch_size: int) -> Float[Array, "B N p*p*3"]:
    """Cuts tiles into flattened patches in raster order, and drops a remainder at the right and at the bottom."""
    batch, side = tiles.shape[:2]
    grid = side // patch_size
    tiles = tiles[:, : grid * patch_size, : grid * patch_size]
    # [B, grid row, row in patch, grid column, column in patch, RGB]
    tiles = tiles.reshape(batch, grid, patch_size, grid, patch_size, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, patch_size * patch_size * 3)


class VisionEncoder(nn.Module):
    """Vision encoder. It expects tiles from `normalize_tiles`."""

    config: VisionConfig

    @nn.compact
    @ordinary_modes()
    def __call__(
        self, tiles: Float[Array, "B S S 3"], is_real: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B N d"]:
        """Returns one feature per patch.

        Args:
          tiles: pixels in [-1, 1].
          is_real: False for tiles that only fill up a bin; None means that all tiles are real. On TPUs the attention
            of the others is skipped, so their features are finite but have no meaning. Everything else is computed for
            all tiles, because shapes are fixed.
        """
        config = hardware.resolve(self.config)
        segment_ids = None
        # The other kernels cannot skip a tile, and are faster without segments.
        if is_real is not None and config.attention == "splash":
            # A tile is one segment, and a padding tile has none.
            segment_ids = jnp.broadcast_to(is_real[:, None], (tiles.shape[0], config.num_patches)).astype(jnp.int32)
        patches = extract_patches(tiles, config.patch_size)
        embed = layers.Dense(config.hidden_size, ("patch", "embed"), dtype=config.dtype, name="patch_embedding")
        positions = layers.param(
            self,
            "position_embedding",
            nn.initializers.normal(0.02),
            ("position", "embed"),
            (config.num_patches, config.hidden_size),
        )
        # Add in float32, so that the gradient of the positions is summed over the batch in float32.
        hidden = layers.constrain((embed(patches) + positions).astype(config.dtype), "batch", None, None)
        unroll = hardware.unrolls_layers(config)
        stack = layers.scan_layers(
            VisionLayer,
            config.num_layers,
            config.remat,
            in_axes=(nn.broadcast,),
            is_initializing=self.is_initializing(),
            unroll=unroll,
        )
        hidden, _ = stack(config, name="layers")(hidden, segment_ids)
        return layers.LayerNorm(config.layer_norm_eps, name="final_norm")(hidden)


class VisionLayer(nn.Module):
    """Pre-LayerNorm transformer block: bidirectional attention, then an MLP with the tanh GELU."""

    config: VisionConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "B N d"], segment_ids: Int[Array, "B N"] | None):
        """Returns the hidden states, and None as the output that `nn.scan` expects."""
        config = self.config
        normed = layers.LayerNorm(config.layer_norm_eps, name="attention_norm")(hidden)
        hidden += VisionAttention(config, name="attention")(normed, segment_ids)
        normed = layers.LayerNorm(config.layer_norm_eps, name="mlp_norm")(hidden)
        inner = layers.Dense(config.intermediate_size, ("embed", "mlp"), dtype=config.dtype, name="mlp_in")(normed)
        inner = nn.gelu(checkpoint_name(inner, MLP_IN), approximate=True)
        hidden += layers.Dense(config.hidden_size, ("mlp", "embed"), dtype=config.dtype, name="mlp_out")(inner)
        return layers.constrain(hidden, "batch", None, None), None


class VisionAttention(nn.Module):
    """Multi-head attention among the patches of one tile."""

    config: VisionConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "B N d"], segment_ids: Int[Array, "B N"] | None) -> Float[Array, "B N d"]:
        """Returns the output of the attention."""
        config = self.config
        head_dim = config.hidden_size // config.num_heads

        def project(name):
            outputs = layers.Dense(config.hidden_size, ("embed", "heads"), dtype=config.dtype, name=name)(hidden)
            return checkpoint_name(outputs.reshape(*hidden.shape[:2], config.num_heads, head_dim), QKV)

        attended = packed_attention(
            project("query"),
            project("key"),
            project("value"),
            segment_ids=segment_ids,
            causal=False,
            kernel=config.attention,
            mesh_axes=layers.attention_mesh(),
        )
        attended = attended.reshape(hidden.shape)
        return layers.Dense(config.hidden_size, ("heads", "embed"), dtype=config.dtype, name="out")(attended)
