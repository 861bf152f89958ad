"""Floating-point operations that a training step needs: the numerator of model FLOPs utilization (MFU).

Axes: N patches per tile, p patch side, d encoder width, f width of its MLP, D decoder width, F width of its MLP, V
vocabulary, H query heads, G key-value heads, h head width, n length of a segment.

Only the matrix products that the *model* needs for the examples of a step are counted, with two FLOPs per multiply-add.
Everything else that a program does (rematerialization, padding of bins, tiles and heads, masked blocks, statistics,
elementwise operations, the optimizer) is not counted, so programs can be compared by their utilization. This definition
of MFU is from Chowdhery et al., arXiv 2204.02311, appendix B.

Forward:

    encoder     per tile      N (2·3p²·d + layers · 2 (4d² + 2df))  +  layers · 4 N² d
    connector   per tile      in the docstring of its file in `models/connectors/`
    decoder     per token     layers · 2 (2DHh + 2DGh + 3DF)
                per segment   layers · 4 Hh n(n+1)/2                 causal: of n² pairs only those that see each other
    loss        per answer    2DV                                    only where a token is to be predicted

The branches of a tree (`docs/trees.md`) share the tokens of their page. A branch of b tokens after a page of n sees the
keys of the page and its own: b n + b(b+1)/2 pairs. The sum over all tokens of position + 1 counts both kinds of pairs.

In the backward pass, a product costs its forward FLOPs once more for each factor that needs a gradient
(`models/flop_counts.py`). In total, a trained part costs three times its forward pass, a frozen encoder once, and a
frozen decoder after a trained connector twice (its attention three times).
"""

import dataclasses

from alignvlm_jax.models.alignvlm import AlignVLMConfig, connector_shape
from alignvlm_jax.models.connectors import connector_spec
from alignvlm_jax.models.flop_counts import TrainedParts, product_flops
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs of each part of the model, for all examples and over all chips."""

    encoder: float
    connector: float
    decoder: float
    loss: float

    @property
    def total(self) -> float:
        """FLOPs of all parts together."""
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
    """Returns the FLOPs of a forward and a backward pass.

    Args:
      config: the model.
      trainable: the parts that are trained (`StageConfig.trainable`); an empty tuple means the forward pass alone.
      tiles: number of real tiles, without padding.
      tokens: number of real positions, of text and of visual tokens.
      answer_tokens: number of positions with a loss.
      squared_lengths: sum of 2 * position + 1 over the tokens. For a segment without branches, this is the square of
        its length.
    """
    trained = TrainedParts("vision" in trainable, "connector" in trainable, "language" in trainable)
    count_connector = connector_spec(config.connector).flops
    # The LM head, per answer token.
    head = 2 * config.language.hidden_size * config.language.vocab_size
    return ModelFlops(
        encoder=tiles * _encoder(config.vision, trained),
        connector=tiles * count_connector(config.connector, connector_shape(config), trained),
        # A token at position p attends to p + 1 keys: half of (2 p + 1) + 1.
        decoder=_decoder(config.language, trained, tokens, pairs=(squared_lengths + tokens) / 2),
        loss=answer_tokens * product_flops(head, weights=trained.language, inputs=trained.any),
    )


def _encoder(config: VisionConfig, trained: TrainedParts) -> float:
    """Returns the FLOPs of one tile."""
    patches, width, inner = config.num_patches, config.hidden_size, config.intermediate_size
    # The pixels never need a gradient.
    embedding = product_flops(patches * 2 * 3 * config.patch_size**2 * width, weights=trained.vision, inputs=False)
    gradients = dict(weights=trained.vision, inputs=trained.vision)
    linear = product_flops(patches * 2 * (4 * width**2 + 2 * width * inner), **gradients)
    attention = product_flops(4 * patches**2 * width, **gradients)
    return embedding + config.num_layers * (linear + attention)


def _decoder(config: LanguageConfig, trained: TrainedParts, tokens: float, pairs: float) -> float:
    """Returns the FLOPs of all tokens.

    Args:
      config: the decoder.
      trained: the trained parts.
      tokens: number of tokens.
      pairs: number of pairs of a query and a key that it attends to.
    """
    width, queries = config.hidden_size, config.num_heads * config.head_width
    keys = config.num_kv_heads * config.head_width
    weights = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
    linear = product_flops(tokens * 2 * weights, weights=trained.language, inputs=trained.any)
    # Both factors of attention's products are activations.
    attention = product_flops(pairs * 4 * queries, weights=trained.any, inputs=trained.any)
    return config.num_layers * (linear + attention)
