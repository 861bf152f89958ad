"""The floating-point operations that a training step needs: the numerator of model FLOP utilisation (MFU).

Axes: N patches per tile, N' visual tokens per tile, d encoder width, f its MLP's, D decoder width, F its MLP's, V
vocabulary, H query heads, G key-value heads, h head width, R latents, K visual words.

Counted are the matrix products, a multiply-add as two FLOP, that the *model* needs for the examples in a step; what a
program does beside (rematerialisation, padding of bins, tiles and heads, masked blocks, statistics, elementwise work,
the optimizer) is not, so programs can be compared by it. MFU in this sense is from Chowdhery et al., arXiv 2204.02311,
appendix B.

Forward, per layer where there are layers:

    encoder     a tile      N (2·3p²·d + layers · 2 (4d² + 2df))  +  layers · 4 N² d
    ALIGN       a tile      N (2dD + 2DV + 2VD)                    W1, logits, expected embedding: the dense form
    MLP         a tile      N (2dD + 2D²)
    Ovis        a tile      N (2dK + 2KD)
    H-Reducer   a tile      N' (2wd² + 2dD)                        windows of w features; N' as `tokens_per_tile`
    Perceiver   a tile      N · 2 (2dI + ID)  +  depth · (2 (2RDHh + 2(N+R)DGh + 12RD²) + 4 R (N+R) Hh)
    decoder     a token     layers · 2 (2DHh + 2DGh + 3DF)
                a segment   layers · 4 Hh n(n+1)/2                 causal: of n² pairs those that see each other
    loss        an answer   2DV                                    only where a token is to be predicted

Backward, a product costs its forward FLOP once more for each factor that needs a gradient: its weights where their part
is trained, its input where anything trained lies before it. So a part that is trained costs three times its forward
pass, a frozen encoder once, a frozen decoder behind a trained connector twice (and its attention three times).
"""

import dataclasses

from alignvlm_jax.models.alignvlm import AlignVLMConfig, tokens_per_tile
from alignvlm_jax.models.connectors import (
    AlignConfig,
    CAbstractorConfig,
    HReducerConfig,
    MLPConfig,
    OvisConfig,
    PerceiverConfig,
)
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOP of the parts of the model, of all examples and over all chips."""

    encoder: float
    connector: float
    decoder: float
    loss: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.encoder + self.connector + self.decoder + self.loss


def train_flops(
    config: AlignVLMConfig,
    trainable: tuple[str, ...],
    *,
    tiles: float,
    tokens: float,
    answer_tokens: float,
    squared_lengths: float,
) -> ModelFlops:
    """What a forward and a backward pass need.

    Args:
      config: the model.
      trainable: the parts that are trained (`StageConfig.trainable`); none means the forward pass alone.
      tiles: real tiles, padding left out.
      tokens: real positions, of text and of visual tokens.
      answer_tokens: positions with a loss.
      squared_lengths: sum over segments (examples) of the square of their length.
    """
    flow = _Flow("vision" in trainable, "connector" in trainable, "language" in trainable)
    return ModelFlops(
        encoder=tiles * _encoder(config.vision, flow),
        connector=tiles * _connector(config, flow),
        decoder=_decoder(config.language, flow, tokens, pairs=(squared_lengths + tokens) / 2),
        loss=answer_tokens
        * _product(2 * config.language.hidden_size * config.language.vocab_size)(
            weights=flow.language, inputs=flow.any
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Flow:
    """Which parts are trained."""

    vision: bool
    connector: bool
    language: bool

    @property
    def visual(self) -> bool:
        """Whether a gradient flows into the visual tokens for the sake of what lies before them."""
        return self.vision or self.connector

    @property
    def any(self) -> bool:
        return self.vision or self.connector or self.language


def _product(forward: float):
    """The cost of a product by which of its factors need a gradient."""
    return lambda weights, inputs: forward * (1 + weights + inputs)


def _encoder(config: VisionConfig, flow: _Flow) -> float:
    patches, width, inner = config.num_patches, config.hidden_size, config.intermediate_size
    trained = flow.vision
    embed = _product(patches * 2 * 3 * config.patch_size**2 * width)(weights=trained, inputs=False)
    linear = _product(patches * 2 * (4 * width**2 + 2 * width * inner))(weights=trained, inputs=trained)
    attention = _product(4 * patches**2 * width)(weights=trained, inputs=trained)
    return embed + config.num_layers * (linear + attention)


def _connector(config: AlignVLMConfig, flow: _Flow) -> float:
    """Of a tile. Each connector is a first product, which reads the encoder, and what follows."""
    connector, patches = config.connector, config.vision.num_patches
    source, width = config.vision.hidden_size, config.language.hidden_size

    def first(forward):
        return _product(forward)(weights=flow.connector, inputs=flow.vision)

    def later(forward):
        return _product(forward)(weights=flow.connector, inputs=flow.visual)

    match connector:
        case AlignConfig():
            words = connector.vocab_size or config.language.vocab_size
            mix = _product(2 * words * width)(weights=flow.language, inputs=flow.visual)  # the decoder's embeddings
            return patches * (first(2 * source * width) + later(2 * width * words) + mix)
        case MLPConfig():
            return patches * (first(2 * source * width) + later(2 * width**2))
        case OvisConfig():
            return patches * (first(2 * source * connector.num_words) + later(2 * connector.num_words * width))
        case HReducerConfig():
            return tokens_per_tile(config) * (first(2 * connector.window * source**2) + later(2 * source * width))
        case PerceiverConfig():
            inner = connector.intermediate_size or 4 * width
            queries, keys = (heads * connector.head_dim for heads in (connector.num_heads, connector.num_kv_heads))
            latents, read = connector.num_latents, patches + connector.num_latents
            linear = 2 * (2 * latents * width * queries + 2 * read * width * keys + 12 * latents * width**2)
            attention = 4 * latents * read * queries
            gradients = dict(weights=flow.visual, inputs=flow.visual)  # attention's two factors are both inputs
            layer = later(linear) + _product(attention)(**gradients)
            return patches * (first(4 * source * inner) + later(2 * inner * width)) + connector.depth * layer
        case CAbstractorConfig():
            channels, tokens, depth = connector.hidden_size, connector.num_tokens, connector.depth
            # Of a place on the grid: two products, nine shifts. Pooling and squeezing are not worth counting.
            block = 4 * channels**2 + 18 * channels
            widen = 2 * source * channels * (1 if source == channels else 2)  # conv_in, and the shortcut's
            before = patches * (first(widen) + later(block - 2 * channels**2 + (depth - 1) * block))
            readout = 2 * channels * width + 2 * width**2
            return before + tokens * later(depth * block + readout)
    raise TypeError(f"no FLOP formula for {type(connector).__name__}")


def _decoder(config: LanguageConfig, flow: _Flow, tokens: float, pairs: float) -> float:
    """`pairs`: of a query and a key that it sees."""
    width, queries = config.hidden_size, config.num_heads * config.head_width
    keys = config.num_kv_heads * config.head_width
    weights = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    linear = _product(tokens * 2 * weights)(weights=flow.language, inputs=flow.any)
    attention = _product(pairs * 4 * queries)(weights=flow.any, inputs=flow.any)
    return config.num_layers * (linear + attention)
