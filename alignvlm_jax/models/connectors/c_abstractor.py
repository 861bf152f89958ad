"""HoneyBee's C-Abstractor: convolutions, pooling to a smaller square grid, convolutions again, and a two-layer readout.

Axes: B tiles, N features per tile (a square grid of side g), d encoder width, C channels of the blocks, S side of the
grid after pooling, D decoder width, V vocabulary.

    features + position -> depth blocks (d -> C) -> average pooling to S x S -> depth blocks -> Linear, SiLU, Linear

Source: arXiv 2312.06742 and its public code (`CAbstractor`, whose blocks are timm's `RegStage` with stride 1, SiLU and
LayerNorm over channels). A block is RegNet's "Y" bottleneck as timm builds it there: neither narrower inside nor
grouped, that is, with a depthwise 3 x 3 convolution.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput

# timm's LayerNorm behind a convolution, and its ratio of the squeezed channels to the block's input.
_EPS = 1e-5
_SQUEEZE = 0.25


@dataclasses.dataclass(frozen=True)
class CAbstractorConfig:
    """HoneyBee's defaults.

    Attributes:
      num_tokens: visual tokens of a tile, S squared.
      depth: blocks before the pooling, and as many after.
      hidden_size: C.
    """

    num_tokens: int = 144
    depth: int = 3
    hidden_size: int = 1024


class CAbstractorConnector(nn.Module):
    """N features in, `num_tokens` tokens out, on a grid as the features are."""

    config: CAbstractorConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        del text_embedding
        config, (batch, num_features, width) = self.config, features.shape
        init = nn.initializers.truncated_normal(0.02)
        position = layers.param(self, "position_embedding", init, ("position", "embed"), (num_features, width))
        grid = math.isqrt(num_features)
        hidden = (features + position.astype(features.dtype)).reshape(batch, grid, grid, width)
        for index in range(config.depth):
            hidden = RegNetBlock(config.hidden_size, self.dtype, name=f"before_{index}")(hidden)
        hidden = adaptive_average_pool(hidden, math.isqrt(config.num_tokens))
        for index in range(config.depth):
            hidden = RegNetBlock(config.hidden_size, self.dtype, name=f"after_{index}")(hidden)
        hidden = hidden.reshape(batch, config.num_tokens, hidden.shape[-1])
        hidden = layers.Dense(self.output_size, ("mlp", "embed"), dtype=self.dtype, name="readout_in")(hidden)
        readout = layers.Dense(self.output_size, ("embed", "embed_out"), dtype=self.dtype, name="readout_out")
        return ConnectorOutput(readout(nn.silu(hidden)))


class RegNetBlock(nn.Module):
    """1 x 1, depthwise 3 x 3, squeeze and excitation, 1 x 1, around a shortcut; each convolution has a LayerNorm."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Float[Array, "B g g c"]) -> Float[Array, "B g g C"]:
        def conv(inputs, name, axes):
            outputs = layers.Dense(self.features, axes, False, self.dtype, name=name)(inputs)
            return layers.LayerNorm(_EPS, name=f"{name}_norm")(outputs)

        width = inputs.shape[-1]
        hidden = nn.silu(conv(inputs, "conv_in", ("embed", "mlp")))
        kernel = layers.param(
            self, "depthwise", nn.initializers.lecun_normal(in_axis=(0, 1)), (None, None, "mlp"), (3, 3, self.features)
        )
        hidden = depthwise_3x3(hidden, kernel.astype(hidden.dtype))
        hidden = nn.silu(layers.LayerNorm(_EPS, name="depthwise_norm")(hidden))
        squeezed = layers.Dense(round(_SQUEEZE * width), ("mlp", "embed"), dtype=self.dtype, name="squeeze")(
            jnp.mean(hidden, axis=(1, 2))
        )
        excited = layers.Dense(self.features, ("embed", "mlp"), dtype=self.dtype, name="excite")(nn.silu(squeezed))
        hidden = conv(hidden * nn.sigmoid(excited)[:, None, None], "conv_out", ("mlp", "embed"))
        shortcut = inputs if width == self.features else conv(inputs, "shortcut", ("embed", "mlp"))
        return nn.silu(hidden + shortcut)


def depthwise_3x3(inputs: Float[Array, "B g g C"], kernel: Float[Array, "3 3 C"]) -> Float[Array, "B g g C"]:
    """Each channel convolved with its own 3 x 3 kernel, zeros around.

    Nine shifted products, which XLA fuses into one pass; as a grouped convolution of C groups it is slow on CPUs.
    """
    rows, columns = inputs.shape[1:3]
    padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (padded[:, i : i + rows, j : j + columns] * kernel[i, j] for i in range(3) for j in range(3))
    return sum(shifted)


def adaptive_average_pool(inputs: Float[Array, "B g g C"], side: int) -> Float[Array, "B S S C"]:
    """Means over windows as torch.nn.AdaptiveAvgPool2d cuts them: where S does not divide g they overlap."""
    averages = jnp.asarray(_pooling_windows(inputs.shape[1], side), inputs.dtype)
    return jnp.einsum("sg,bghc,th->bstc", averages, inputs, averages)


def _pooling_windows(grid: int, side: int) -> np.ndarray:
    """Rows of weights: window s covers floor(s g / S) to ceil((s + 1) g / S).

    before: grid 3, side 2
    after:  [[1/2, 1/2, 0], [0, 1/2, 1/2]]
    """
    weights = np.zeros((side, grid))
    for index in range(side):
        first, last = index * grid // side, -(-(index + 1) * grid // side)
        weights[index, first:last] = 1 / (last - first)
    return weights
