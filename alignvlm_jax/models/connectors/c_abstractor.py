"""HoneyBee's C-Abstractor: convolutions, pooling to a smaller square grid, convolutions again, and a two-layer readout.

Axes: B tiles, N features per tile (a square grid of side g), d encoder width, C channels of the blocks, S side of the
grid after pooling, D decoder width, V vocabulary.

    features + position -> depth blocks (d -> C) -> average pooling to S x S -> depth blocks -> Linear, SiLU, Linear

Source: arXiv 2312.06742 and its public code (`CAbstractor`, whose blocks are timm's `RegStage` with stride 1, SiLU and
LayerNorm over channels). A block is RegNet's "Y" bottleneck as timm builds it there: it is neither narrower inside nor
grouped, so its 3 x 3 convolution is depthwise.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignvlm_jax.errors import UserError
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import layers
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.registry import ConnectorConfig, ConnectorShape, ConnectorSpec
from alignvlm_jax.models.flop_counts import TrainedParts
from alignvlm_jax.models.weight_table import DEPTHWISE, Row, layer_norm_rows, linear_rows

# Epsilon of timm's LayerNorm after a convolution.
_EPS = 1e-5
# Ratio of the squeezed channels to the channels of the block's input in timm.
_SQUEEZE = 0.25


@dataclasses.dataclass(frozen=True)
class CAbstractorConfig(ConnectorConfig):
    """Settings of the C-Abstractor. The defaults follow HoneyBee.

    Attributes:
      num_tokens: number of visual tokens per tile, S squared.
      depth: number of blocks before the pooling, and also of those after it.
      hidden_size: C.
    """

    num_tokens: int = 144
    depth: int = 3
    hidden_size: int = 1024


class CAbstractorConnector(nn.Module):
    """Maps the N features of a tile to `num_tokens` tokens, which form a square grid like the features."""

    config: CAbstractorConfig
    output_size: int
    dtype: str = "float32"

    @nn.compact
    @ordinary_modes()
    def __call__(self, features: Float[Array, "B N d"], text_embedding: Float[Array, "V D"]) -> ConnectorOutput:
        """Returns the visual tokens of tiles."""
        del text_embedding
        config, (batch, num_features, width) = self.config, features.shape
        init = nn.initializers.truncated_normal(0.02)
        position = layers.param(self, "position_embedding", init, ("position", "embed"), (num_features, width))
        grid = math.isqrt(num_features)
        hidden = (features + position.astype(features.dtype)).reshape(batch, grid, grid, width)
        # Convolutions on the full grid, pooling, convolutions on the smaller grid.
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
    """Residual block: convolutions 1 x 1, depthwise 3 x 3, squeeze and excitation, 1 x 1, each with a LayerNorm."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Float[Array, "B g g c"]) -> Float[Array, "B g g C"]:
        """Returns the output of the block."""

        def conv(inputs, name, axes):
            # A 1 x 1 convolution is a Dense layer on the channels.
            outputs = layers.Dense(self.features, axes, False, self.dtype, name=name)(inputs)
            return layers.LayerNorm(_EPS, name=f"{name}_norm")(outputs)

        width = inputs.shape[-1]
        hidden = nn.silu(conv(inputs, "conv_in", ("embed", "mlp")))
        kernel = layers.param(
            self, "depthwise", nn.initializers.lecun_normal(in_axis=(0, 1)), (None, None, "mlp"), (3, 3, self.features)
        )
        hidden = depthwise_3x3(hidden, kernel.astype(hidden.dtype))
        hidden = nn.silu(layers.LayerNorm(_EPS, name="depthwise_norm")(hidden))
        # Squeeze and excitation: scale each channel by a gate that is computed from the mean over the grid.
        squeezed = layers.Dense(round(_SQUEEZE * width), ("mlp", "embed"), dtype=self.dtype, name="squeeze")(
            jnp.mean(hidden, axis=(1, 2))
        )
        excited = layers.Dense(self.features, ("embed", "mlp"), dtype=self.dtype, name="excite")(nn.silu(squeezed))
        hidden = conv(hidden * nn.sigmoid(excited)[:, None, None], "conv_out", ("mlp", "embed"))
        # The residual connection needs a projection if the block changes the number of channels.
        shortcut = inputs if width == self.features else conv(inputs, "shortcut", ("embed", "mlp"))
        return nn.silu(hidden + shortcut)


def depthwise_3x3(inputs: Float[Array, "B g g C"], kernel: Float[Array, "3 3 C"]) -> Float[Array, "B g g C"]:
    """Convolves each channel with its own 3 x 3 kernel. The grid is padded with zeros."""
    rows, columns = inputs.shape[1:3]
    # XLA fuses nine shifted products into one pass. A grouped convolution with C groups would be slow on CPUs.
    padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (padded[:, i : i + rows, j : j + columns] * kernel[i, j] for i in range(3) for j in range(3))
    return sum(shifted)


def adaptive_average_pool(inputs: Float[Array, "B g g C"], side: int) -> Float[Array, "B S S C"]:
    """Averages windows as torch.nn.AdaptiveAvgPool2d does; they overlap if S does not divide g."""
    averages = jnp.asarray(_pooling_windows(inputs.shape[1], side), inputs.dtype)
    return jnp.einsum("sg,bghc,th->bstc", averages, inputs, averages)


def _pooling_windows(grid: int, side: int) -> np.ndarray:
    """Returns the weights of each window [S, g]: window s covers floor(s g / S) to ceil((s + 1) g / S).

    For example, grid 3 and side 2 give [[1/2, 1/2, 0], [0, 1/2, 1/2]].
    """
    weights = np.zeros((side, grid))
    for index in range(side):
        first, last = index * grid // side, -(-(index + 1) * grid // side)
        weights[index, first:last] = 1 / (last - first)
    return weights


def _token_grid(config: CAbstractorConfig, shape: ConnectorShape) -> tuple[int, int]:
    side = math.isqrt(config.num_tokens)
    return side, side


def _flops(config: CAbstractorConfig, shape: ConnectorShape, trained: TrainedParts) -> float:
    source, channels, width = shape.source_width, config.hidden_size, shape.output_width
    # Per position of the grid, a block takes two 1 x 1 convolutions and nine shifted products. Pooling and squeezing
    # are too small to count.
    block = 4 * channels**2 + 18 * channels
    # In the first block, `conv_in` reads the encoder's width, and so does the shortcut's convolution if the widths
    # differ.
    widen = 2 * source * channels * (1 if source == channels else 2)
    first_block = trained.first_product(widen) + trained.later_product(block - 2 * channels**2)
    before = shape.num_features * (first_block + trained.later_product((config.depth - 1) * block))
    readout = 2 * channels * width + 2 * width**2
    return before + config.num_tokens * trained.later_product(config.depth * block + readout)


def _weight_rows(config: CAbstractorConfig, shape: ConnectorShape) -> tuple[Row, ...]:
    rows = [Row("position_embedding", "position_embedding")]
    # The blocks are separate modules and their parameters are not stacked, so each has its own rows.
    for half in ("before", "after"):
        for index in range(config.depth):
            path, key = f"{half}_{index}", f"{half}.{index}"
            # The first block has a convolution in its shortcut if it changes the width.
            widens = half == "before" and index == 0 and shape.source_width != config.hidden_size
            for name in ("conv_in", "conv_out", *(["shortcut"] if widens else [])):
                rows += linear_rows(f"{path}/{name}", f"{key}.{name}", bias=False)
                rows += layer_norm_rows(f"{path}/{name}_norm", f"{key}.{name}_norm")
            rows.append(Row(f"{path}/depthwise", f"{key}.depthwise.weight", DEPTHWISE))
            rows += layer_norm_rows(f"{path}/depthwise_norm", f"{key}.depthwise_norm")
            rows += linear_rows(f"{path}/squeeze", f"{key}.squeeze", bias=True)
            rows += linear_rows(f"{path}/excite", f"{key}.excite", bias=True)
    rows += linear_rows("readout_in", "readout_in", bias=True)
    return (*rows, *linear_rows("readout_out", "readout_out", bias=True))


def _check(config: CAbstractorConfig, shape: ConnectorShape) -> None:
    tokens = config.num_tokens
    if not 0 < tokens <= shape.num_features or math.isqrt(tokens) ** 2 != tokens:
        raise UserError(
            "config.model.connector.num_tokens: expected a square number, at most the encoder's "
            f"{shape.num_features} patches, got {tokens}"
        )


SPEC = ConnectorSpec(
    name="c_abstractor",
    title="C-Abstractor",
    description="convolutions and pooling to a smaller grid, as in HoneyBee",
    config=CAbstractorConfig,
    module=CAbstractorConnector,
    token_grid=_token_grid,
    flops=_flops,
    weight_rows=_weight_rows,
    check=_check,
)
