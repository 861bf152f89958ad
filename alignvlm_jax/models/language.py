"""Llama decoder, for packed training rows and for cached decoding.

Axes: B rows, L positions, K cache slots, D model width, V vocabulary, H query heads, G key-value heads, h head width,
P pages, N slots of a page.

It follows transformers' `LlamaForCausalLM`: RMSNorm before attention and MLP, rotary positions in the "rotate half"
layout, grouped-query attention, SwiGLU, and a language-model head that may share the embedding table.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models import hardware, layers, rematerialization
from alignvlm_jax.models.unstacking import is_unstacked
from alignvlm_jax.ops.attention import cached_attention, packed_attention
from alignvlm_jax.ops.attention_page import page_attention
from alignvlm_jax.ops.checkpoint_names import MLP_IN, QKV
from alignvlm_jax.ops.embedding_lookup import embedding_lookup
from alignvlm_jax.ops.linear_cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Settings of Llama 3.1's frequency scaling (`rope_type: llama3` in transformers)."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Settings of the decoder. The defaults are Llama-3.2-1B.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_size: width of the gated MLPs.
      num_layers: number of decoder blocks.
      num_heads: H.
      num_kv_heads: G.
      head_dim: h; None means D divided by the number of heads.
      rope_theta: base of the rotary frequencies.
      rope_scaling: scaling of the rotary frequencies, if any.
      rms_norm_eps: epsilon of every RMSNorm.
      tie_word_embeddings: whether the language-model head is the embedding table.
      max_position_embeddings: number of positions that the decoder was trained for.
      remat: rematerialization in the backward pass, as in `VisionConfig`.
      dtype: dtype of the arithmetic, as in `VisionConfig`.
      attention: attention kernel, as in `VisionConfig`.
      loss_memory_mib: memory in which training keeps numbers of the loss that would otherwise be computed twice, in
        MiB on each device: `kept_bytes` of `ops/linear_cross_entropy.py`.
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int | None = None
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 131072
    remat: str | tuple[str, ...] = rematerialization.NONE
    dtype: str = "auto"
    attention: str = "auto"
    loss_memory_mib: int = 512

    def __post_init__(self):
        """Writes `remat` as one string."""
        object.__setattr__(self, "remat", rematerialization.canonical(self.remat))

    @property
    def head_width(self) -> int:
        """h: `head_dim` if given, otherwise the model width divided by the number of heads."""
        return self.head_dim or self.hidden_size // self.num_heads


@flax.struct.dataclass
class KVCache:
    """Keys and values of the positions decoded so far.

    All rows write to the same slots, so that one update serves the batch. `filled` marks the slots that count for a
    row. Rows that begin with the same positions may share them: `page` then holds those once for Q adjacent rows.

    The axes are in the order of attention's products, queries [.., h] times keys [h, K] and weights [.., K] times
    values [K, h]: a decoding step writes one slot in place and reads the others where they are.

    Attributes:
      keys: keys; one array for all layers, or one per layer after `unstack`, for weights from `unstack_layers`.
      values: values, in the same form.
      filled: whether a slot holds a real position of its row; False for padding and for free slots.
      index: the next slot to write.
      page: the positions before the slots, which are not written to; row r reads row r // Q of it. None if there are
        none.
    """

    keys: Float[Array, "layers B G h K"] | tuple[Float[Array, "B G h K"], ...]
    values: Float[Array, "layers B G K h"] | tuple[Float[Array, "B G K h"], ...]
    filled: Bool[Array, "B K"]
    index: Int[Array, ""]
    page: "KVCache | None" = None

    @ordinary_modes()
    def unstack(self) -> "KVCache":
        """Returns the cache with one array per layer."""
        page = None if self.page is None else self.page.unstack()
        return self.replace(keys=tuple(self.keys), values=tuple(self.values), page=page)


@ordinary_modes()
def empty_cache(config: LanguageConfig, batch_size: int, num_slots: int) -> KVCache:
    """Returns a cache for `batch_size` rows of at most `num_slots` positions, padding included."""
    rows, dtype = (config.num_layers, batch_size, config.num_kv_heads), hardware.resolve(config).dtype
    return KVCache(
        keys=jnp.zeros((*rows, config.head_width, num_slots), dtype),
        values=jnp.zeros((*rows, num_slots, config.head_width), dtype),
        filled=jnp.zeros((batch_size, num_slots), bool),
        index=jnp.zeros((), jnp.int32),
    )


class LanguageModel(nn.Module):
    """Decoder, which maps embeddings to hidden states; `embed` comes before it, `logits` or `loss` after."""

    config: LanguageConfig

    def setup(self):
        """Creates the embedding table, the head and the layers."""
        config = self.config
        table = (config.vocab_size, config.hidden_size)
        self.embedding = layers.param(self, "embedding", nn.initializers.normal(0.02), ("vocab", "embed"), table)
        if not config.tie_word_embeddings:
            self.head = layers.param(self, "lm_head", nn.initializers.normal(0.02), ("vocab", "embed"), table)
        resolved = hardware.resolve(config)
        unroll = hardware.unrolls_layers(resolved)
        stack = layers.scan_layers(
            DecoderLayer,
            config.num_layers,
            config.remat,
            in_axes=(nn.broadcast, 0),
            is_initializing=self.is_initializing(),
            unroll=unroll,
        )
        self.layers = stack(resolved)
        self.final_norm = layers.RMSNorm(config.rms_norm_eps)

    @ordinary_modes()
    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the embeddings of tokens."""
        dtype = hardware.resolve(self.config).dtype
        return embedding_lookup(self.embedding, tokens, dtype=dtype, mesh_axes=layers.vocabulary_mesh())

    @ordinary_modes()
    def __call__(
        self,
        inputs: Float[Array, "B L D"],
        *,
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
        branch_ids: Int[Array, "B L"] | None = None,
        branch_tokens: int | None = None,
        cache: KVCache | None = None,
        cache_is_empty: bool = False,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Runs all layers and the final norm.

        Args:
          inputs: embeddings of text and visual tokens.
          positions: rotary positions; they restart with each example of a packed row.
          segment_ids: 0 is padding; attention stays within a segment. With a cache: 0 or 1, one example per row.
          branch_ids: branches of the trees of packed rows, as in `ops.attention.packed_attention`; not with a cache.
          branch_tokens: largest number of positions with a branch in a row; None means L.
          cache: if given, the L new positions are appended to it and attend to its complete content.
          cache_is_empty: whether the cache is known to be empty. The new positions then attend only to each other, with
            the faster kernel of packed rows.

        Returns:
          Hidden states, and the extended cache (None if none was given).
        """
        cosines, sines = rotary_table(self.config, positions)
        context = _Context(cosines, sines, segment_ids, branch_ids, branch_tokens)
        # Training: packed rows without a cache.
        if cache is None:
            hidden, _ = self._run_layers(inputs, context, None)
            return self.final_norm(hidden), None

        # Decoding: mark the new slots, and tell the layers where to write.
        length, num_slots = inputs.shape[1], cache.filled.shape[1]
        filled = jax.lax.dynamic_update_slice(cache.filled, segment_ids > 0, (0, cache.index))
        context = context.replace(index=cache.index)
        if cache.page is not None:
            page = cache.page
            context = context.replace(page=(page.keys, page.values), page_visible=page.filled)
        if not cache_is_empty or cache.page is not None:
            # A query attends to the filled slots of its row, up to its own slot. If the cache is empty, only the first
            # slots can be filled.
            first, num_seen = (0, length) if cache_is_empty else (cache.index, num_slots)
            query_slots = first + jnp.arange(length)
            causal = jnp.arange(num_seen)[None, :] <= query_slots[:, None]
            context = context.replace(visible=filled[:, None, :num_seen] & causal[None])
        hidden, (keys, values) = self._run_layers(inputs, context, (cache.keys, cache.values))
        return self.final_norm(hidden), KVCache(keys, values, filled, cache.index + length, cache.page)

    def _run_layers(self, hidden: Float[Array, "B L D"], context: "_Context", cache):
        """Returns the hidden states and the (keys, values) of the cache after all layers; the cache may be None."""
        weights = self.variables.get("params", {}).get("layers")
        if not is_unstacked(weights):
            # The cache is part of the scan's carry, which XLA changes in place. As input and output it would be copied.
            (hidden, cache), _ = self.layers((hidden, cache), context, jnp.arange(self.config.num_layers))
            return hidden, cache
        layer = DecoderLayer(hardware.resolve(self.config), parent=None)
        caches = [None] * len(weights) if cache is None else list(zip(*cache, strict=True))
        pages = [None] * len(weights) if context.page is None else list(zip(*context.page, strict=True))
        for index, params in enumerate(weights):
            own_context = context.replace(page=pages[index])
            (hidden, caches[index]), _ = layer.apply({"params": params}, (hidden, caches[index]), own_context, None)
        return hidden, None if cache is None else tuple(zip(*caches, strict=True))

    @ordinary_modes()
    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns the scores of every word of the vocabulary, in float32."""
        return jnp.dot(hidden, self._head_table().T.astype(hidden.dtype), preferred_element_type=jnp.float32)

    @ordinary_modes()
    def loss(
        self, hidden: Float[Array, "B L D"], targets: Int[Array, "B L"], weights: Float[Array, "B L"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the sum over positions of weight * -log p(target), and the sum of the weights."""
        mesh_axes, kept_bytes = layers.vocabulary_mesh(), self.config.loss_memory_mib << 20
        return linear_cross_entropy(
            hidden, self._head_table(), targets, weights, kept_bytes=kept_bytes, mesh_axes=mesh_axes
        )

    def _head_table(self) -> Float[Array, "V D"]:
        return self.embedding if self.config.tie_word_embeddings else self.head


@flax.struct.dataclass
class _Context:
    """Inputs that all layers share.

    Attributes:
      cosines: cosines of the rotary angles.
      sines: sines of the rotary angles.
      segment_ids: segment of each position; 0 is padding.
      branch_ids: branch of each position in its segment; None without trees.
      branch_tokens: largest number of positions with a branch in a row.
      visible: cache slots that each query attends to, K of them or only the first; None if the queries attend only to
        each other.
      index: first cache slot to write; None without a cache.
      page: keys and values of the pages that rows share, of all layers or of one; None without.
      page_visible: slots of a page that its rows attend to.
    """

    cosines: Float[Array, "B L 1 h"]
    sines: Float[Array, "B L 1 h"]
    segment_ids: Int[Array, "B L"]
    branch_ids: Int[Array, "B L"] | None = None
    branch_tokens: int | None = flax.struct.field(pytree_node=False, default=None)
    visible: Bool[Array, "B L K"] | None = None
    index: Int[Array, ""] | None = None
    page: tuple[Any, Any] | None = None
    page_visible: Bool[Array, "P N"] | None = None


class DecoderLayer(nn.Module):
    """Pre-RMSNorm block: causal grouped-query attention, then SwiGLU."""

    config: LanguageConfig

    @nn.compact
    def __call__(self, carry, context: _Context, layer: Int[Array, ""] | None):
        """Returns the carry after this layer, and None, as `nn.scan` expects.

        Args:
          carry: hidden states [B, L, D], and the cache's (keys, values) of all layers or None.
          context: what all layers share.
          layer: number of this layer in the cache; None if the cache is that of this layer alone.
        """
        config = self.config
        hidden, cache = carry
        normed = layers.RMSNorm(config.rms_norm_eps, name="attention_norm")(hidden)
        attended, cache = DecoderAttention(config, name="attention")(normed, context, cache, layer)
        hidden += attended
        normed = layers.RMSNorm(config.rms_norm_eps, name="mlp_norm")(hidden)
        hidden += GatedMLP(config.intermediate_size, config.hidden_size, config.dtype, name="mlp")(normed)
        return (layers.constrain(hidden, "batch", "sequence", None), cache), None


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions; `cache` is the (keys, values) of all layers or None."""

    config: LanguageConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"], context: _Context, cache, layer: Int[Array, ""] | None):
        """Returns the output and the cache, to which this layer has added its new keys and values."""
        config = self.config

        def project(name, num_heads):
            width = num_heads * config.head_width
            outputs = layers.Dense(width, ("embed", "heads"), use_bias=False, dtype=config.dtype, name=name)(hidden)
            return outputs.reshape(*hidden.shape[:2], num_heads, config.head_width)

        query = rotate(project("query", config.num_heads), context.cosines, context.sines)
        key = rotate(project("key", config.num_kv_heads), context.cosines, context.sines)
        value = project("value", config.num_kv_heads)
        query, key, value = (checkpoint_name(heads, QKV) for heads in (query, key, value))
        if cache is not None:
            # Before the attention, because queries also attend to the new positions. From [B, L, G, h] to the axes of
            # `KVCache`.
            key_slots = _write(cache[0], key.transpose(0, 2, 3, 1), layer, slot_axis=3, index=context.index)
            value_slots = _write(cache[1], value.transpose(0, 2, 1, 3), layer, slot_axis=2, index=context.index)
            cache = (key_slots, value_slots)
        # With earlier positions in the cache, attend to its slots; otherwise (training, prefill) only to the inputs.
        if context.visible is not None:
            own, page = (cache, context.page) if layer is None else _layer_of((cache, context.page), layer)
            attended = _attend_to_cache(query, own, page, context)
        else:
            attended = packed_attention(
                query,
                key,
                value,
                segment_ids=context.segment_ids,
                branch_ids=context.branch_ids,
                branch_tokens=context.branch_tokens,
                causal=True,
                kernel=config.attention,
                mesh_axes=layers.attention_mesh(),
            )
        attended = attended.reshape(*hidden.shape[:2], config.num_heads * config.head_width)
        out = layers.Dense(config.hidden_size, ("heads", "embed"), use_bias=False, dtype=config.dtype, name="out")
        return out(attended), cache


def _layer_of(caches, layer: Int[Array, ""]):
    return jax.tree.map(lambda array: array[layer], caches)


def _attend_to_cache(query: Float[Array, "B L H h"], own, page, context: _Context) -> Float[Array, "B L H h"]:
    """Attends to the (keys, values) of a row's slots, and to those of its page if there is one."""
    if page is None:
        return cached_attention(query, *own, visible=context.visible)
    # The slots after those that anything attends to are free.
    num_seen = context.visible.shape[-1]
    own = (own[0][..., :num_seen], own[1][..., :num_seen, :])
    return page_attention(query, page, own, page_visible=context.page_visible, visible=context.visible)


def _write(cache: Array, new: Array, layer: Int[Array, ""] | None, *, slot_axis: int, index: Int[Array, ""]) -> Array:
    """Writes new positions [B, G, ...] into a layer of a cache, or into the cache of one layer if `layer` is None."""
    start = [0] * new.ndim
    start[slot_axis] = index
    if layer is None:
        return jax.lax.dynamic_update_slice(cache, new, start)
    return jax.lax.dynamic_update_slice(cache, new[None], (layer, *start))


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    intermediate_size: int
    output_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Returns the output of the MLP."""

        def dense(features, axes, name):
            return layers.Dense(features, axes, use_bias=False, dtype=self.dtype, name=name)

        gate = dense(self.intermediate_size, ("embed", "mlp"), "gate")(inputs)
        up = dense(self.intermediate_size, ("embed", "mlp"), "up")(inputs)
        gate, up = checkpoint_name(gate, MLP_IN), checkpoint_name(up, MLP_IN)
        return dense(self.output_size, ("mlp", "embed"), "down")(nn.silu(gate) * up)


def rotary_table(
    config: LanguageConfig, positions: Int[Array, "B L"]
) -> tuple[Float[Array, "B L 1 h"], Float[Array, "B L 1 h"]]:
    """Returns the cosines and sines of the rotary angles in float32.

    Each frequency occurs twice, once for each half of a head.
    """
    half = config.head_width // 2
    frequencies = config.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    # float32: bfloat16 cannot represent large positions.
    angles = positions[..., None, None].astype(jnp.float32) * jnp.concatenate([frequencies, frequencies])
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    heads: Float[Array, "B L heads h"], cosines: Float[Array, "B L 1 h"], sines: Float[Array, "B L 1 h"]
) -> Float[Array, "B L heads h"]:
    """Rotates each pair (i, i + h/2) of a head by its angle."""
    # For halves (a, b): (a cos - b sin, b cos + a sin).
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (heads * cosines + rotated * sines).astype(heads.dtype)


def _scale_frequencies(frequencies: Float[Array, " half"], scaling: RopeScaling) -> Float[Array, " half"]:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates between (transformers' `llama3` rule)."""
    wavelengths = 2 * math.pi / frequencies
    # Number of full turns within the context length of the original training.
    turns = scaling.original_max_position_embeddings / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / scaling.factor)
