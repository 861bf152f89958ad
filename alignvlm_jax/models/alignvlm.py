"""AlignVLM: encoder, connector and decoder, for packed training rows and for cached decoding.

Axes: B rows (bins), L positions, M tiles per bin, S tile side, N features per tile, N' visual tokens per tile,
T = M * N' visual tokens per bin, d encoder width, D decoder width, V vocabulary.

The model reads the packed batches of `data/packing.py`. It embeds the text of each row, runs the encoder on the tiles
and the connector on their features, and puts visual token `visual_index[l]` at position l unless that index is -1:

    tokens        <begin> <user> <image> <image> What  is ...
    visual_index       -1     -1       0       1   -1  -1
    input              E      E        v0      v1   E   E        E: text embedding, v: visual token

Under the tiling rule anyres_max_9, a visual token is a mixture of up to four outputs of the connector, or the learned
vector that ends a row. The batch then holds the mixtures as `visual_sources` and `visual_weights`
(`data/resampling.py`).
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import hardware, layers
from alignvlm_jax.models.connectors import (
    AlignConfig,
    ConnectorConfig,
    ConnectorShape,
    connector_spec,
    exact_dtypes,
    make_connector,
)
from alignvlm_jax.models.language import KVCache, LanguageConfig, LanguageModel
from alignvlm_jax.models.vision import VisionConfig, VisionEncoder, normalize_tiles

PARTS = ("vision", "connector", "language")
"""Top-level keys of the parameter tree: the parts that a stage can train or freeze."""

Params = dict[str, Any]
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class AlignVLMConfig:
    """Settings of the model.

    Attributes:
      vision: settings of the encoder.
      connector: settings of the connector. Their class selects the kind of connector.
      language: settings of the decoder.
      newline: whether a learned vector ends every row of visual tokens. It must be True with the tiling rule
        anyres_max_9, and False otherwise. The vector is one of the connector's weights.
    """

    vision: VisionConfig = VisionConfig()
    connector: ConnectorConfig = AlignConfig()
    language: LanguageConfig = LanguageConfig()
    newline: bool = False


def connector_shape(config: AlignVLMConfig) -> ConnectorShape:
    """Returns the sizes of the encoder and the decoder that the connector depends on."""
    return ConnectorShape(
        grid_size=config.vision.grid_size,
        source_width=config.vision.hidden_size,
        output_width=config.language.hidden_size,
        vocab_size=config.language.vocab_size,
    )


def token_grid(config: AlignVLMConfig) -> tuple[int, int]:
    """Returns the grid (rows, columns) of one tile's visual tokens, after the connector.

    Tokens without positions in their tile (`ConnectorSpec.is_spatial`) form one row.
    """
    return connector_spec(config.connector).token_grid(config.connector, connector_shape(config))


def tokens_per_tile(config: AlignVLMConfig) -> int:
    """Returns N', the number of visual tokens of one tile, after the connector."""
    return math.prod(token_grid(config))


@flax.struct.dataclass
class AlignVLMOutput:
    """Output of the model.

    Attributes:
      logits: logits of the next token, float32.
      effective_tokens: exp(entropy) of the visual tokens' distributions over words, averaged over the tiles that are
        not padding; None for connectors without such a distribution.
    """

    logits: Float[Array, "B L V"]
    effective_tokens: Float[Array, ""] | None


@flax.struct.dataclass
class AlignVLMLoss:
    """Loss of a batch, as a sum and its weight. Their quotient is the mean loss.

    Attributes:
      loss: sum over positions of weight * -log p(target), float32.
      weight: sum of the weights.
      effective_tokens: as in `AlignVLMOutput`.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    effective_tokens: Float[Array, ""] | None


class Newline(nn.Module):
    """Learned vector that ends a row of visual tokens, initialized like LLaVA-NeXT's `image_newline`."""

    size: int

    @nn.compact
    def __call__(self) -> Float[Array, " D"]:
        """Returns the vector."""
        return layers.param(self, "newline", nn.initializers.normal(self.size**-0.5), (None,), (self.size,))


class AlignVLM(nn.Module):
    """Encoder, connector and decoder. The parameters have the top-level keys `PARTS`."""

    config: AlignVLMConfig

    def setup(self):
        """Creates the three parts."""
        config = self.config
        self.vision = VisionEncoder(config.vision)
        dtype = hardware.resolve(config.language).dtype
        self.connector = make_connector(config.connector, output_size=config.language.hidden_size, dtype=dtype)
        self.language = LanguageModel(config.language)
        if config.newline:
            # Store it with the connector's weights, so that a stage trains or freezes them together.
            self.newline = Newline(config.language.hidden_size)
            nn.share_scope(self.newline, self.connector)

    @ordinary_modes()
    def __call__(self, batch: Batch, branch_tokens: int | None = None) -> AlignVLMOutput:
        """Scores every position of packed rows.

        Args:
          batch: `tokens`, `segment_ids`, `positions`, `visual_index` [B, L], `tiles` [B, M, S, S, 3] and
            `tile_valid_hw` [B, M, 2]; with newlines also `visual_sources` and `visual_weights` [B, L, 4]; with trees
            also `branch_ids` [B, L]. Other fields are ignored.
          branch_tokens: largest number of positions with a branch in a row; None means L.
        """
        hidden, effective_tokens = self.read(batch, branch_tokens)
        return AlignVLMOutput(self.language.logits(hidden), effective_tokens)

    @ordinary_modes()
    def loss(self, batch: Batch, branch_tokens: int | None = None) -> AlignVLMLoss:
        """Returns the loss of packed rows, without materializing the [B, L, V] logits.

        Args:
          batch: as for `__call__`, with `targets` and `loss_weights` [B, L].
          branch_tokens: as for `__call__`.
        """
        hidden, effective_tokens = self.read(batch, branch_tokens)
        loss, weight = self.language.loss(hidden, batch["targets"], batch["loss_weights"])
        return AlignVLMLoss(loss, weight, effective_tokens)

    @ordinary_modes()
    def text_loss(self, batch: Batch, branch_tokens: int | None = None) -> AlignVLMLoss:
        """Returns the loss of packed rows of text. It needs neither images nor the weights of the other parts."""
        inputs = layers.constrain(self.language.embed(batch["tokens"]), "batch", "sequence", None)
        hidden = self._decode_rows(batch, inputs, branch_tokens)
        loss, weight = self.language.loss(hidden, batch["targets"], batch["loss_weights"])
        return AlignVLMLoss(loss, weight, None)

    @ordinary_modes()
    def read(
        self, batch: Batch, branch_tokens: int | None = None
    ) -> tuple[Float[Array, "B L D"], Float[Array, ""] | None]:
        """Returns the hidden states of packed rows, and the effective tokens of `AlignVLMOutput`."""
        visual, entropy = self.encode_images(batch["tiles"], batch["tile_valid_hw"])
        inputs = self.merge(batch, visual)
        hidden = self._decode_rows(batch, inputs, branch_tokens)
        return hidden, _effective_tokens(entropy, batch["tile_valid_hw"])

    def _decode_rows(
        self, batch: Batch, inputs: Float[Array, "B L D"], branch_tokens: int | None
    ) -> Float[Array, "B L D"]:
        hidden, _ = self.language(
            inputs,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            branch_ids=batch.get("branch_ids"),
            branch_tokens=branch_tokens,
        )
        return hidden

    @ordinary_modes()
    def encode_images(
        self, tiles: UInt8[Array, "B M S S 3"], tile_valid_hw: Int[Array, "B M 2"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"] | None]:
        """Returns the visual tokens of each bin, in the order of its tiles, and the entropy of each (or None)."""
        features = self.encode_features(tiles, tile_valid_hw)
        output = self.connector(features, self.language.embedding)
        # [B * M, N', D] -> [B, T, D]
        rows = tiles.shape[0]
        visual = output.tokens.reshape(rows, -1, output.tokens.shape[-1])
        entropy = None if output.entropy is None else output.entropy.reshape(rows, -1)
        return layers.constrain(visual, "batch", None, None), entropy

    @ordinary_modes()
    def encode_features(
        self, tiles: UInt8[Array, "B M S S 3"], tile_valid_hw: Int[Array, "B M 2"]
    ) -> Float[Array, "B*M N d"]:
        """Returns the encoder's features of every tile, which are the input of the connector.

        Noise is added to them if the variables contain it (`models/feature_noise.py`).
        """
        pixels = normalize_tiles(tiles, tile_valid_hw)
        # Tiles of height 0 are padding of the bin.
        is_real = (tile_valid_hw[..., 0] > 0).reshape(-1)
        features = self.vision(pixels.reshape(-1, *pixels.shape[2:]), is_real)
        noise = self.get_variable("perturbation", "features")
        return features if noise is None else noise.add_to(features, tiles)

    @ordinary_modes()
    def merge(self, batch: Batch, visual: Float[Array, "B T D"]) -> Float[Array, "B L D"]:
        """Embeds the text and puts visual tokens at the positions given by `visual_index`."""
        text = self.language.embed(batch["tokens"])
        index = batch["visual_index"]
        if self.config.newline:
            gathered = mix_visual(visual, self.newline(), batch["visual_sources"], batch["visual_weights"])
        else:
            # At text positions (-1) this gathers token 0, which the `where` below discards.
            gathered = jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)
        inputs = jnp.where((index >= 0)[..., None], gathered.astype(text.dtype), text)
        return layers.constrain(inputs, "batch", "sequence", None)

    @ordinary_modes()
    def prefill(self, batch: Batch, cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
        """Reads prompts into an empty cache: one example per row, padded on the right.

        Args:
          batch: as for `__call__`; `segment_ids` is 1 on the prompt and 0 on padding.
          cache: from `empty_cache`, with enough slots for the prompts and the answers.

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
        return self._last_logits(hidden, batch["segment_ids"]), cache

    @ordinary_modes()
    def prefill_branches(self, batch: Batch, cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
        """Reads the text that follows pages into an empty cache: one branch per row, padded on the right.

        Args:
          batch: `tokens`, `segment_ids` and `positions` [B, L]; the positions continue from the row's page.
          cache: from `empty_cache`, with the `page` that `prefill` filled.

        Returns:
          Scores of the token that follows each branch, and the filled cache.
        """
        inputs = layers.constrain(self.language.embed(batch["tokens"]), "batch", "sequence", None)
        hidden, cache = self.language(
            inputs,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            cache=cache,
            cache_is_empty=True,
        )
        return self._last_logits(hidden, batch["segment_ids"]), cache

    def _last_logits(self, hidden: Float[Array, "B L D"], segment_ids: Int[Array, "B L"]) -> Float[Array, "B V"]:
        # Rows differ in length: score only the last real position of each.
        last = jnp.maximum(jnp.sum(segment_ids > 0, axis=1) - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.language.logits(hidden)

    @ordinary_modes()
    def decode_step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends one text token to every row and scores the next one.

        Args:
          tokens: the newest token of each row.
          positions: their positions, which differ between rows if the prompts' lengths do.
          cache: keys and values of all earlier positions.

        Returns:
          Scores of the next token of each row, and the extended cache.
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
    """Returns the sum over k of weights[k] * visual[sources[k]] at every position, in float32.

    Source -1 stands for the newline.
    """
    mixed = jnp.zeros((), jnp.float32)
    # A loop over the four sources holds one gathered [B, L, D] at a time instead of [B, L, 4, D].
    for k in range(sources.shape[-1]):
        source = sources[..., k, None]
        feature = jnp.take_along_axis(visual, jnp.maximum(source, 0), axis=1).astype(jnp.float32)
        mixed += weights[..., k, None] * jnp.where(source >= 0, feature, newline.astype(jnp.float32))
    return mixed


def _effective_tokens(entropy, tile_valid_hw) -> Float[Array, ""] | None:
    if entropy is None:
        return None
    # Tiles of height 0 are padding of the bin.
    is_real = (tile_valid_hw[..., 0] > 0).astype(jnp.float32)
    per_tile = jnp.mean(jnp.exp(entropy).reshape(*is_real.shape, -1), axis=-1)
    return jnp.sum(per_tile * is_real) / jnp.maximum(jnp.sum(is_real), 1.0)


@ordinary_modes()
def example_batch(config: AlignVLMConfig, *, rows: int = 1, tiles: int = 1, length: int | None = None) -> Batch:
    """Returns a batch of zeros in the model's shapes, for initialization and for shape evaluation."""
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
        "visual_index": text - 1,  # -1: no visual tokens
        "tiles": jnp.zeros((rows, tiles, side, side, 3), jnp.uint8),
        "tile_valid_hw": jnp.zeros((rows, tiles, 2), jnp.int32),
        **(resampling if config.newline else {}),
    }


def stored_dtypes(params: Params, dtype: str) -> Params:
    """Returns the dtype of each parameter if weights are stored as `dtype`.

    A few parameters of connectors keep their own dtype (`ConnectorSpec.exact_dtypes`).
    """
    exact = exact_dtypes()

    def find(path, leaf):
        del leaf
        # The parameters are unboxed: the first key of a path is the part, and the last one is the parameter.
        part, name = path[0].key, path[-1].key
        return exact.get(name, dtype) if part == "connector" else dtype

    return jax.tree_util.tree_map_with_path(find, params)


@ordinary_modes()
def random_parameters(config: AlignVLMConfig, rng: PRNGKeyArray) -> Params:
    """Returns random float32 parameters, wrapped in `nn.LogicallyPartitioned`; ALIGN's W2 is a copy of the LM head."""
    params = AlignVLM(config).init(rng, example_batch(config))["params"]
    return seed_connector(config, params)


@functools.lru_cache(maxsize=16)
@ordinary_modes()
def parameter_shapes(config: AlignVLMConfig) -> Params:
    """Returns shapes and dtypes of the random parameters, in the same boxes with the logical names of their axes.

    The model is traced once per config. Do not change the returned tree.
    """
    return jax.eval_shape(lambda: random_parameters(config, jax.random.key(0)))


@ordinary_modes()
def seed_connector(config: AlignVLMConfig, params: Params) -> Params:
    """Sets the connector's parameters that start from the LM head, such as ALIGN's W2. Call it before stage 1."""
    spec = connector_spec(config.connector)
    if spec.seed is None:
        return params
    language = params["language"]
    head = language["embedding" if config.language.tie_word_embeddings else "lm_head"]
    seeded = spec.seed(config.connector, connector_shape(config), head)
    return {**params, "connector": {**params["connector"], **seeded}}
