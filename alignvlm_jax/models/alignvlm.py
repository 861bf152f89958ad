"""AlignVLM: encoder, connector and decoder composed, for packed training rows and for cached decoding.

Axes: B rows (bins), L positions, M tiles per bin, S tile side, N features per tile, T = M * N' visual tokens per bin,
D decoder width, V vocabulary.

The model reads the packed batch of `data/packing.py`. Of each row it embeds the text, runs the encoder over the tiles
and the connector over their features, and puts visual token `visual_index[l]` at position l where that is not -1:

    tokens        <begin> <user> <image> <image> What  is ...
    visual_index       -1     -1       0       1   -1  -1
    input              E      E        v0      v1   E   E        E: text embedding, v: visual token

Under the tiling rule anyres_max_9 a visual token is a mixture of up to four of the connector's outputs, or the learned
end of a row: the batch then says which, as `visual_sources` and `visual_weights` (`data/resampling.py`).
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from alignvlm_jax.models import hardware, layers
from alignvlm_jax.models.connectors import (
    AlignConfig,
    CAbstractorConfig,
    ConnectorConfig,
    HReducerConfig,
    PerceiverConfig,
    make_connector,
)
from alignvlm_jax.models.connectors.align import EXACT
from alignvlm_jax.models.language import KVCache, LanguageConfig, LanguageModel
from alignvlm_jax.models.vision import VisionConfig, VisionEncoder, normalize_tiles

PARTS = ("vision", "connector", "language")
"""The top level of the parameter tree, and what a stage may train or freeze."""

Params = dict[str, Any]
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class AlignVLMConfig:
    """The three parts, and what joins tiles.

    newline: a learned vector ends every row of visual tokens: exactly under the tiling rule anyres_max_9. It is one of
      the connector's weights.
    """

    vision: VisionConfig = VisionConfig()
    connector: ConnectorConfig = AlignConfig()
    language: LanguageConfig = LanguageConfig()
    newline: bool = False


def token_grid(config: AlignVLMConfig) -> tuple[int, int]:
    """Rows and columns of the visual tokens that one tile becomes, after the connector; one row if they have none."""
    rows = config.vision.grid_size
    if isinstance(config.connector, PerceiverConfig):
        return 1, config.connector.num_latents
    if isinstance(config.connector, CAbstractorConfig):
        return (math.isqrt(config.connector.num_tokens),) * 2
    if isinstance(config.connector, HReducerConfig):
        return rows, math.ceil(rows / config.connector.window)
    return rows, rows


def tokens_per_tile(config: AlignVLMConfig) -> int:
    """N': visual tokens that one tile becomes, after the connector."""
    return math.prod(token_grid(config))


@flax.struct.dataclass
class AlignVLMOutput:
    """Attributes:
    logits: scores of the next token, float32.
    effective_tokens: exp(entropy) of the visual tokens' distributions over words, averaged over the bins' real tiles;
      NaN for connectors that have no such distribution.
    """

    logits: Float[Array, "B L V"]
    effective_tokens: Float[Array, ""]


@flax.struct.dataclass
class AlignVLMLoss:
    """Attributes:
    loss: sum over positions of weight * -log p(target), float32.
    weight: sum of the weights.
    effective_tokens: as in `AlignVLMOutput`.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    effective_tokens: Float[Array, ""]


class Newline(nn.Module):
    """The vector that ends a row of visual tokens; drawn as LLaVA-NeXT's `image_newline` is."""

    size: int

    @nn.compact
    def __call__(self) -> Float[Array, " D"]:
        return layers.param(self, "newline", nn.initializers.normal(self.size**-0.5), (None,), (self.size,))


class AlignVLM(nn.Module):
    """The whole model. Parameters have the top-level keys `PARTS`."""

    config: AlignVLMConfig

    def setup(self):
        config = self.config
        self.vision = VisionEncoder(config.vision)
        dtype = hardware.resolve(config.language).dtype
        self.connector = make_connector(config.connector, output_size=config.language.hidden_size, dtype=dtype)
        self.language = LanguageModel(config.language)
        if config.newline:
            # Among the connector's weights, so that a stage trains or freezes them together.
            self.newline = Newline(config.language.hidden_size)
            nn.share_scope(self.newline, self.connector)

    def __call__(self, batch: Batch) -> AlignVLMOutput:
        """Scores every position of packed rows.

        Args:
          batch: `tokens`, `segment_ids`, `positions`, `visual_index` [B, L], `tiles` [B, M, S, S, 3] and
            `tile_valid_hw` [B, M, 2]; with newlines also `visual_sources` and `visual_weights` [B, L, 4]. Further
            fields are ignored.
        """
        hidden, effective_tokens = self.read(batch)
        return AlignVLMOutput(self.language.logits(hidden), effective_tokens)

    def loss(self, batch: Batch) -> AlignVLMLoss:
        """The loss of packed rows; the scores of all positions and words are never held.

        Args:
          batch: as for `__call__`, with `targets` and `loss_weights` [B, L].
        """
        hidden, effective_tokens = self.read(batch)
        loss, weight = self.language.loss(hidden, batch["targets"], batch["loss_weights"])
        return AlignVLMLoss(loss, weight, effective_tokens)

    def read(self, batch: Batch) -> tuple[Float[Array, "B L D"], Float[Array, ""]]:
        """Hidden states of packed rows, and the effective tokens of `AlignVLMOutput`."""
        visual, entropy = self.encode_images(batch["tiles"], batch["tile_valid_hw"])
        inputs = self.merge(batch, visual)
        hidden, _ = self.language(inputs, positions=batch["positions"], segment_ids=batch["segment_ids"])
        return hidden, _effective_tokens(entropy, batch["tile_valid_hw"])

    def encode_images(
        self, tiles: UInt8[Array, "B M S S 3"], tile_valid_hw: Int[Array, "B M 2"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"] | None]:
        """Turns the tiles of each bin into its visual tokens, in order, with the entropy of each (or None)."""
        features = self.encode_features(tiles, tile_valid_hw)
        output = self.connector(features, self.language.embedding)
        rows = tiles.shape[0]
        visual = output.tokens.reshape(rows, -1, output.tokens.shape[-1])
        entropy = None if output.entropy is None else output.entropy.reshape(rows, -1)
        return layers.constrain(visual, "batch", None, None), entropy

    def encode_features(
        self, tiles: UInt8[Array, "B M S S 3"], tile_valid_hw: Int[Array, "B M 2"]
    ) -> Float[Array, "B*M N d"]:
        """The encoder's features of every tile, tiles of all bins in one row: what the connector reads.

        Noise is added to them where the variables have some (`models/feature_noise.py`).
        """
        pixels = normalize_tiles(tiles, tile_valid_hw)
        features = self.vision(pixels.reshape(-1, *pixels.shape[2:]))
        noise = self.get_variable("perturbation", "features")
        return features if noise is None else noise.add_to(features, tiles)

    def merge(self, batch: Batch, visual: Float[Array, "B T D"]) -> Float[Array, "B L D"]:
        """Embeds text and puts visual tokens where `visual_index` says."""
        text = self.language.embed(batch["tokens"])
        index = batch["visual_index"]
        if self.config.newline:
            gathered = mix_visual(visual, self.newline(), batch["visual_sources"], batch["visual_weights"])
        else:
            gathered = jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)
        inputs = jnp.where((index >= 0)[..., None], gathered.astype(text.dtype), text)
        return layers.constrain(inputs, "batch", "sequence", None)

    def prefill(self, batch: Batch, cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
        """Reads prompts, one example a row, padded on the right, into an empty cache.

        Args:
          batch: as for `__call__`; `segment_ids` is 1 on the prompt and 0 on padding.
          cache: from `empty_cache`, with room for the prompts and for what will be decoded.

        Returns:
          Scores of the token that follows each prompt, and the filled cache.
        """
        visual, _ = self.encode_images(batch["tiles"], batch["tile_valid_hw"])
        inputs = self.merge(batch, visual)
        hidden, cache = self.language(
            inputs,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            cache=cache,
            cache_is_empty=True,
        )
        last = jnp.maximum(jnp.sum(batch["segment_ids"] > 0, axis=1) - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.language.logits(hidden), cache

    def decode_step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends one text token to every row and scores the next.

        Args:
          tokens: the tokens decoded last.
          positions: their positions, which differ between rows when the prompts' lengths do.
          cache: what came before.
        """
        inputs = self.language.embed(tokens[:, None])
        segment_ids = jnp.ones_like(tokens[:, None])
        hidden, cache = self.language(inputs, positions=positions[:, None], segment_ids=segment_ids, cache=cache)
        return self.language.logits(hidden[:, 0]), cache


def mix_visual(
    visual: Float[Array, "B T D"],
    newline: Float[Array, " D"],
    sources: Int[Array, "B L 4"],
    weights: Float[Array, "B L 4"],
) -> Float[Array, "B L D"]:
    """At every position the sum over k of weights[k] * visual[sources[k]], float32; source -1 is the newline."""
    mixed = jnp.zeros((), jnp.float32)
    for k in range(sources.shape[-1]):
        source = sources[..., k, None]
        feature = jnp.take_along_axis(visual, jnp.maximum(source, 0), axis=1).astype(jnp.float32)
        mixed += weights[..., k, None] * jnp.where(source >= 0, feature, newline.astype(jnp.float32))
    return mixed


def _effective_tokens(entropy, tile_valid_hw) -> Float[Array, ""]:
    if entropy is None:
        return jnp.float32(jnp.nan)
    real = (tile_valid_hw[..., 0] > 0).astype(jnp.float32)
    per_tile = jnp.mean(jnp.exp(entropy).reshape(*real.shape, -1), axis=-1)
    return jnp.sum(per_tile * real) / jnp.maximum(jnp.sum(real), 1.0)


def example_batch(config: AlignVLMConfig, *, rows: int = 1, tiles: int = 1, length: int | None = None) -> Batch:
    """A batch of zeros in the model's shapes, for initialisation and for shape evaluation."""
    length = length or tiles * tokens_per_tile(config) + 1
    side = config.vision.image_size
    text = jnp.zeros((rows, length), jnp.int32)
    resampling = {
        "visual_sources": jnp.zeros((rows, length, 4), jnp.int32),
        "visual_weights": jnp.zeros((rows, length, 4)),
    }
    return {
        "tokens": text,
        "targets": text,
        "loss_weights": text.astype(jnp.float32),
        "segment_ids": text,
        "positions": text,
        "visual_index": text - 1,
        "tiles": jnp.zeros((rows, tiles, side, side, 3), jnp.uint8),
        "tile_valid_hw": jnp.zeros((rows, tiles, 2), jnp.int32),
        **(resampling if config.newline else {}),
    }


def stored_dtypes(params: Params, dtype: str) -> Params:
    """The dtype of each parameter where weights are stored as `dtype`: all have that one but those of `EXACT`."""

    def find(path, leaf):
        del leaf
        part, name = path[0].key, path[-1].key
        return EXACT.get(name, dtype) if part == "connector" else dtype

    return jax.tree_util.tree_map_with_path(find, params)


def random_parameters(config: AlignVLMConfig, rng: PRNGKeyArray) -> Params:
    """Fresh float32 parameters, wrapped in `nn.LogicallyPartitioned`; ALIGN's W2 is a copy of the LM head already."""
    params = AlignVLM(config).init(rng, example_batch(config))["params"]
    return seed_connector(config, params)


def seed_connector(config: AlignVLMConfig, params: Params) -> Params:
    """Copies the LM head (tied or not) into ALIGN's W2; other connectors are left alone. Call it before stage 1."""
    if not isinstance(config.connector, AlignConfig):
        return params
    language = params["language"]
    head = language["embedding" if config.language.tie_word_embeddings else "lm_head"]
    rows = config.connector.kept_words or config.connector.vocab_size or config.language.vocab_size
    w2 = jax.tree.map(lambda table: jnp.array(table[:rows], copy=True), head)
    return {**params, "connector": {**params["connector"], "w2": w2}}


SEEDED = ("w2",)
"""The connector's parameters that follow from the language model's: what `seed_connector` makes."""
