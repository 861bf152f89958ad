"""PyTorch AlignVLM model: SigLIP encoder, connector, Llama decoder.

ALIGN maps every visual feature f to a distribution over the words of the language model (the tokens of its vocabulary),
and returns the expected embedding under this distribution (arXiv 2502.01341, section 3):

    P  = softmax(LN_V(W2 · LN_D(W1 f)))        distribution over the V words
    F' = P · E_text                            a point in the convex hull of the text embeddings

This is attention over the vocabulary, with queries LN_D(W1 f), keys W2 and values E_text. Like attention, it is
computed in blocks, and the complete T x V matrix never exists: see `_stream_words` for inference and
`_checkpoint_queries` for training.

Axes: M tiles, S tile side, N features per tile, N' visual tokens per tile, T features (or, where stated, visual tokens)
of all tiles, K slots per tile for visual tokens of joined tiles, d encoder width, D decoder width, V vocabulary, v a
block of the vocabulary, B rows, L positions.

Encoder and decoder are transformers' own layers, and their attention uses its interface (`attn_implementation=` eager,
sdpa, flash_attention_2, ...). transformers loads this file with `trust_remote_code`. It needs only torch and
transformers.

Sections: ALIGN's arithmetic, connectors, encoder and shared base class, base model, complete model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, LlamaModel, SiglipVisionConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipPreTrainedModel, SiglipVisionEmbeddings
from transformers.utils import can_return_tuple

from .configuration_alignvlm import AlignVLMConfig
from .generation_alignvlm import AlignVLMGenerationMixin, check_counts, if_given, is_empty, is_token
from .outputs_alignvlm import AlignVLMCausalLMOutput, AlignVLMModelOutput, AlignVLMTrainingOutput, DelayedLogits

_IGNORED_LABEL = -100
# The source that stands for the end of a row in `visual_sources`; image_processing_alignvlm.py has the same number.
_NEWLINE = -(2**31)

# Maximum number of logits in memory: 2^25 float32 values are 128 MiB.
_MAX_LOGITS = 2**25
# Maximum number of queries per pass over the vocabulary, and minimum number of words in a block: matrix products of
# smaller blocks are slow.
_MAX_QUERIES = 4096
_MIN_WORDS = 256


# ----------------------------------------------------------------------------------------------------------------------
# ALIGN's arithmetic
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Words:
    """The words that a distribution ranges over, read block by block.

    Each callable takes the slice of words of a block. It calls a module instead of reading a weight, so that hooks
    (offloading, tensor parallelism) can provide the weight.

    Attributes:
        size: V, the number of words.
        keys: returns [v, D] rows of W2.
        norm: returns ([v], [v]) scale and bias of LN_V.
        values: returns [v, D'] embeddings.
        eps: epsilon of LN_V.
        moments: returns the mean and the variance of the logits of queries, each float32 [T, 1]. None computes them
            over these words; a pruned model uses those over its original vocabulary.
    """

    size: int
    keys: Callable[[slice], torch.Tensor]
    norm: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
    values: Callable[[slice], torch.Tensor]
    eps: float
    moments: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def blocks(self, size: int) -> Iterator[slice]:
        """Yields slices of at most `size` words that cover the vocabulary."""
        for start in range(0, self.size, size):
            yield slice(start, min(start + size, self.size))


def expected_embedding(query: torch.Tensor, words: Words) -> torch.Tensor:
    """Computes softmax(LN_V(query · keysᵀ)) · values with float32 statistics.

    Args:
        query: [T, D] queries.
        words: keys, norm and values of the words.

    Returns:
        [T, D'] expected embeddings. They and the factors of both products have the dtype of `query`, or autocast's
        dtype if it is enabled.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query = query.to(torch.get_autocast_dtype(device))
    # The functions below choose the dtype of every operation themselves.
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return _checkpoint_queries(query, words)
        return torch.cat([_stream_words(part, words) for part in query.split(_MAX_QUERIES)])


def word_distribution(query: torch.Tensor, words: Words) -> torch.Tensor:
    """Returns the complete distribution P, float32 [T, V]. Meant for analyses of a few tiles."""
    everything = slice(0, words.size)
    scores = _scores(query, words.keys(everything).to(query), *words.norm(everything), words)
    return F.softmax(scores, dim=-1)


def _checkpoint_queries(query: torch.Tensor, words: Words) -> torch.Tensor:
    """Differentiable form: processes blocks of queries, and recomputes their logits in the backward pass."""
    everything = slice(0, words.size)
    keys, values = words.keys(everything).to(query), words.values(everything).to(query)
    scale, bias = words.norm(everything)

    def attend(query, keys, scale, bias, values):
        p = F.softmax(_scores(query, keys, scale, bias, words), dim=-1)
        return matmul_float32(p.to(values.dtype), values).to(query.dtype)

    blocks = query.split(max(1, _MAX_LOGITS // words.size))
    return torch.cat(
        [
            checkpoint(attend, block, keys, scale, bias, values, use_reentrant=False, preserve_rng_state=False)
            for block in blocks
        ]
    )


def _scores(query, keys, scale, bias, words) -> torch.Tensor:
    """Returns LN_V of the logits of queries [T, D] for all words, [T, V]."""
    logits = matmul_float32(query, keys.T)
    scale, bias = scale.to(logits.dtype), bias.to(logits.dtype)
    if words.moments is None:
        return F.layer_norm(logits, logits.shape[-1:], scale, bias, words.eps)
    # A pruned model normalizes with the statistics of its original vocabulary.
    mean, variance = words.moments(query)
    return (logits - mean) * torch.rsqrt(variance + words.eps) * scale + bias


def _stream_words(query: torch.Tensor, words: Words) -> torch.Tensor:
    """Inference form: streams blocks of words, in one pass for LN_V's statistics and another for the expectation."""
    # The statistics could also be computed from the mean row and the covariance of W2, without the first pass. But this
    # D x D matrix must either be recomputed in float32, which costs more than a pass in bfloat16, or stored, which
    # gives wrong results as soon as the weights are modified. Only a pruned model stores it, because its statistics
    # include removed rows.
    num_queries, dtype = query.shape[0], query.dtype
    block_size = max(_MIN_WORDS, _MAX_LOGITS // max(num_queries, 1))

    def logits(block: slice) -> torch.Tensor:
        return matmul_float32(query, words.keys(block).to(query).T)

    def stream_moments(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and variance of the logits, each [T, 1]."""
        count, mean, squares = 0, query.new_zeros(num_queries, 1, dtype=torch.float32), 0.0
        for block in words.blocks(block_size):
            scores, size = logits(block), block.stop - block.start
            block_mean = scores.mean(dim=-1, keepdim=True)
            delta = block_mean - mean
            # Chan's formula for combining the moments of two sets.
            squares = squares + (scores - block_mean).square_().sum(dim=-1, keepdim=True)
            squares = squares + delta.square() * (count * size / (count + size))
            mean = mean + delta * (size / (count + size))
            count += size
        return mean, squares / words.size

    # First pass: mean and variance of each query's logits over all words.
    mean, variance = (words.moments or stream_moments)(query)
    inverse_deviation = torch.rsqrt(variance + words.eps)

    # Second pass, an online softmax: rescale the sums whenever a block raises the maximum.
    maximum, total, expected = torch.full_like(mean, -math.inf), torch.zeros_like(mean), 0.0
    for block in words.blocks(block_size):
        scale, bias = words.norm(block)
        scores = logits(block).sub_(mean).mul_(inverse_deviation).mul_(scale).add_(bias)
        new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(new_maximum).exp_()
        correction = torch.exp(maximum - new_maximum)
        total = total * correction + weights.sum(dim=-1, keepdim=True)
        expected = expected * correction + matmul_float32(weights.to(dtype), words.values(block).to(query))
        maximum = new_maximum
    return (expected / total).to(dtype)


def matmul_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiplies two matrices; products of bfloat16 and float16 are accumulated and returned in float32."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if not left.is_cuda:
        return left.float() @ right.float()
    return _Float32Product.apply(left, right)


class _Float32Product(torch.autograd.Function):
    """Float32 product of half-precision matrices at their full speed on a GPU.

    `torch.mm` with `out_dtype` does not define a gradient; this class does.
    """

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return torch.mm(left, right, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        gradient = gradient.to(left.dtype)
        return gradient @ right.T, left.T @ gradient


# ----------------------------------------------------------------------------------------------------------------------
# Connectors: connector(features [M, N, d], embed_words) -> visual tokens [M, N', D]
# ----------------------------------------------------------------------------------------------------------------------

# Returns the decoder's embeddings of a slice of words or of word ids. This is a function and not a module, because
# hooks for offloading would try to move a module that is passed as an argument.
EmbedWords = Callable[[slice | torch.Tensor], torch.Tensor]


class WordTable(nn.Module):
    """Table with one row per word; returns the rows of a slice of words."""

    def __init__(self, num_words: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_words, width))

    def forward(self, block: slice) -> torch.Tensor:
        return self.weight[block]


class WordNorm(nn.Module):
    """Scale and bias of a LayerNorm over the words. Returns the values for a slice of words.

    The statistics span all blocks and are computed elsewhere.
    """

    def __init__(self, num_words: int, initial_scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_words))
        self.bias = nn.Parameter(torch.empty(num_words))
        self.initial_scale = initial_scale

    def forward(self, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight[block], self.bias[block]


class KeyStatistics(nn.Module):
    """Mean and covariance of the key rows that LN_V normalizes over in a pruned model; always stored in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("covariance", torch.zeros(width, width, dtype=torch.float32))

    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean and the variance of the logits of queries [T, D], each [T, 1]."""
        # For a query q and keys k: E[q·k] = q · E[k] and Var[q·k] = qᵀ Cov[k] q.
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        mean, covariance = self.mean.to(query), self.covariance.to(query)
        variance = (query @ covariance * query).sum(dim=-1, keepdim=True).clamp(min=0)
        return (query @ mean)[:, None], variance


class AlignConnector(nn.Module):
    """ALIGN connector.

    Its values are the current rows of the decoder's embedding table, which it receives in every call. The connector of
    a pruned model uses only a part of the vocabulary, the words `word_ids`.
    """

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        fields, width = config.connector_config, config.text_config.hidden_size
        kept = fields.get("kept_words")
        self.num_words = kept or fields.get("vocab_size") or config.text_config.vocab_size
        self.eps = fields["layer_norm_eps"]
        self.w1 = nn.Linear(config.vision_config.hidden_size, width, bias=fields["use_bias"])
        self.hidden_norm = nn.LayerNorm(width, eps=self.eps)
        self.w2 = WordTable(self.num_words, width)
        self.vocab_norm = WordNorm(self.num_words, fields["vocab_scale_init"])
        self.register_buffer("word_ids", None if kept is None else torch.arange(kept, dtype=torch.int32))
        self.key_statistics = None if kept is None else KeyStatistics(width)

    @property
    def num_rows_read(self) -> int:
        """Number of rows that the embedding table must have."""
        return self.num_words if self.word_ids is None else int(self.word_ids.max()) + 1

    def forward(self, features: torch.Tensor, embed_words: EmbedWords) -> torch.Tensor:
        query, words = self.query(features), self.words(embed_words)
        return expected_embedding(query.flatten(0, 1), words).view(query.shape)

    def distribution(self, features: torch.Tensor) -> torch.Tensor:
        """Returns P of every feature, float32 [M, N, V]. Meant for analyses of a few tiles.

        In a pruned model, V is the number of its remaining words.
        """
        query = self.query(features)
        return word_distribution(query.flatten(0, 1), self.words()).view(*query.shape[:2], -1)

    def query(self, features: torch.Tensor) -> torch.Tensor:
        """Returns LN_D(W1 f) of every feature, [M, N, D]."""
        return self.hidden_norm(self.w1(features))

    def words(self, embed_words: EmbedWords | None = None) -> Words:
        """Returns the words that P ranges over; `embed_words` is only needed for the expected embedding."""
        values = embed_words if self.word_ids is None else lambda block: embed_words(self.word_ids[block])
        return Words(self.num_words, self.w2, self.vocab_norm, values, self.eps, self.key_statistics)


class OvisConnector(nn.Module):
    """Ovis connector: like ALIGN, with a separate visual vocabulary and embedding table."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        fields = config.connector_config
        self.num_words, self.eps = fields["num_words"], fields["layer_norm_eps"]
        self.head = WordTable(self.num_words, config.vision_config.hidden_size)
        self.word_norm = WordNorm(self.num_words, initial_scale=1.0)
        self.table = WordTable(self.num_words, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor, embed_words: EmbedWords) -> torch.Tensor:
        words = Words(self.num_words, self.head, self.word_norm, self.table, self.eps)
        return expected_embedding(features.flatten(0, 1), words).view(*features.shape[:2], -1)


class MLPConnector(nn.Module):
    """Connector of LLaVA-1.5: Linear, exact GELU and Linear on each feature."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_in = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, features: torch.Tensor, embed_words: EmbedWords) -> torch.Tensor:
        return self.linear_out(F.gelu(self.linear_in(features)))


class HReducerConnector(nn.Module):
    """Connector of DocOwl 1.5: a convolution that merges `window` neighbors of a row, followed by Linear.

    Neighbors are merged along rows because text runs along rows.
    """

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        width, self.window = config.vision_config.hidden_size, config.connector_config["window"]
        self.reduce = nn.Conv2d(width, width, kernel_size=(1, self.window), stride=(1, self.window))
        self.project = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor, embed_words: EmbedWords) -> torch.Tensor:
        grid = math.isqrt(features.shape[1])
        rows = features.transpose(1, 2).unflatten(2, (grid, grid))  # [M, d, grid, grid]
        # Pad on the right to a multiple of the window.
        reduced = self.reduce(F.pad(rows, (0, -grid % self.window)))
        return self.project(reduced.flatten(2).transpose(1, 2))


class CAbstractorConnector(nn.Module):
    """C-Abstractor of HoneyBee: RegNet blocks, adaptive average pooling, RegNet blocks, and a two-layer readout."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        fields, width = config.connector_config, config.vision_config.hidden_size
        channels, depth, self.side = fields["hidden_size"], fields["depth"], math.isqrt(fields["num_tokens"])
        grid = config.vision_config.image_size // config.vision_config.patch_size
        self.position_embedding = nn.Parameter(torch.empty(grid * grid, width))
        self.before = nn.ModuleList(RegNetBlock(channels if index else width, channels) for index in range(depth))
        self.after = nn.ModuleList(RegNetBlock(channels, channels) for _ in range(depth))
        self.readout_in = nn.Linear(channels if depth else width, config.text_config.hidden_size)
        self.readout_out = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor, embed_words: EmbedWords) -> torch.Tensor:
        grid = math.isqrt(features.shape[1])
        hidden = (features + self.position_embedding).unflatten(1, (grid, grid))
        for block in self.before:
            hidden = block(hidden)
        # Pooling needs the channels first; the blocks have them last.
        hidden = F.adaptive_avg_pool2d(hidden.permute(0, 3, 1, 2), self.side).permute(0, 2, 3, 1)
        for block in self.after:
            hidden = block(hidden)
        return self.readout_out(F.silu(self.readout_in(hidden.flatten(1, 2))))


class RegNetBlock(nn.Module):
    """RegNet block: 1 x 1, depthwise 3 x 3, squeeze-and-excitation and 1 x 1 convolutions with a shortcut.

    The channels are the last axis.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        squeezed = round(0.25 * width)
        self.conv_in = nn.Linear(width, channels, bias=False)
        self.conv_in_norm = nn.LayerNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.LayerNorm(channels)
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)
        self.conv_out = nn.Linear(channels, channels, bias=False)
        self.conv_out_norm = nn.LayerNorm(channels)
        self.widens = width != channels
        if self.widens:
            self.shortcut = nn.Linear(width, channels, bias=False)
            self.shortcut_norm = nn.LayerNorm(channels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.conv_in_norm(self.conv_in(inputs)))
        hidden = self.depthwise(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = F.silu(self.depthwise_norm(hidden))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(hidden.mean(dim=(1, 2), keepdim=True)))))
        hidden = self.conv_out_norm(self.conv_out(hidden * gate))
        return F.silu(hidden + (self.shortcut_norm(self.shortcut(inputs)) if self.widens else inputs))


class PerceiverConnector(nn.Module):
    """Perceiver resampler of Idefics2: a fixed number of learned latents attend to the features."""

    def __init__(self, config: AlignVLMConfig):
        super().__init__()
        fields, width = config.connector_config, config.text_config.hidden_size
        inner = fields.get("intermediate_size") or 4 * width
        self.modality_projection = GatedMLP(config.vision_config.hidden_size, inner, width)
        self.latents = nn.Parameter(torch.empty(fields["num_latents"], width))
        self.layers = nn.ModuleList(PerceiverLayer(fields, width) for _ in range(fields["depth"]))
        self.final_norm = nn.RMSNorm(width, eps=fields["rms_norm_eps"])

    def forward(self, features: torch.Tensor, embed_words: EmbedWords) -> torch.Tensor:
        context = self.modality_projection(features)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.final_norm(latents)


class PerceiverLayer(nn.Module):
    """Cross-attention of the latents to [features; latents], followed by a gated MLP of four times their width."""

    def __init__(self, fields: dict, width: int):
        super().__init__()
        self.head_dim, eps = fields["head_dim"], fields["rms_norm_eps"]
        query_width, key_width = fields["num_heads"] * self.head_dim, fields["num_kv_heads"] * self.head_dim
        self.latents_norm = nn.RMSNorm(width, eps=eps)
        self.context_norm = nn.RMSNorm(width, eps=eps)
        self.query = nn.Linear(width, query_width, bias=False)
        self.key = nn.Linear(width, key_width, bias=False)
        self.value = nn.Linear(width, key_width, bias=False)
        self.out = nn.Linear(query_width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.mlp = GatedMLP(width, 4 * width, width)

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def heads(projected):
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        # Latents attend to the features and to each other.
        queries = self.latents_norm(latents)
        context = torch.cat([self.context_norm(context), queries], dim=1)
        attended = F.scaled_dot_product_attention(
            heads(self.query(queries)), heads(self.key(context)), heads(self.value(context)), enable_gqa=True
        )
        latents = latents + self.out(attended.transpose(1, 2).flatten(2))
        return latents + self.mlp(self.mlp_norm(latents))


class GatedMLP(nn.Module):
    """Gated MLP: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, inner: int, output_width: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, output_width, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(inputs)) * self.up(inputs))


CONNECTORS: dict[str, type[nn.Module]] = {
    "align": AlignConnector,
    "mlp": MLPConnector,
    "perceiver": PerceiverConnector,
    "ovis": OvisConnector,
    "h_reducer": HReducerConnector,
    "c_abstractor": CAbstractorConnector,
}


# ----------------------------------------------------------------------------------------------------------------------
# Encoder and shared base class
# ----------------------------------------------------------------------------------------------------------------------


class AlignVLMVisionTransformer(SiglipPreTrainedModel):
    """SigLIP without its pooling head; returns the features after the final LayerNorm."""

    # Built from transformers' modules instead of `SiglipVisionModel`, whose parameter names changed within 5.x.

    config: SiglipVisionConfig
    main_input_name = "pixel_values"
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        """Returns the features [M, N, d] of tiles [M, 3, S, S]."""
        hidden = self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden))


class AlignVLMVisionTower(SiglipPreTrainedModel):
    """Encoder wrapped as `vision_model`, the name of the parameters in SigLIP checkpoints."""

    config: SiglipVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.vision_model = AlignVLMVisionTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        return self.vision_model(pixel_values)


class AlignVLMPreTrainedModel(PreTrainedModel):
    """Base class that initializes weights and declares the features of transformers that the model supports."""

    config: AlignVLMConfig
    config_class = AlignVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "LlamaDecoderLayer",
        "SiglipVisionEmbeddings",
        "SiglipEncoderLayer",
        *(connector.__name__ for connector in CONNECTORS.values()),
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["key_statistics"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, *args, **kwargs) -> nn.Module:
        """Extends transformers' method: ALIGN keeps its words, whatever the number of tokens.

        Raises:
            ValueError: If the new table would lack rows that the connector or the image token needs.
        """
        num_tokens = self.config.text_config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = math.ceil(num_tokens / pad_to_multiple_of) * pad_to_multiple_of
        # Only ALIGN reads the table.
        needed = getattr(self.base_model.connector, "num_rows_read", 0)
        if num_tokens < max(needed, self.config.image_token_id + 1):
            raise ValueError(
                f"cannot shrink the embedding table to {num_tokens} rows: the connector reads {needed} rows, and the "
                f"image token is row {self.config.image_token_id}"
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, WordTable):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, AlignConnector) and module.word_ids is not None:
            init.copy_(module.word_ids, torch.arange(module.num_words))
        elif isinstance(module, KeyStatistics):
            init.zeros_(module.mean)
            init.zeros_(module.covariance)
        elif isinstance(module, WordNorm):
            init.constant_(module.weight, module.initial_scale)
            init.zeros_(module.bias)
        elif isinstance(module, PerceiverConnector):
            init.normal_(module.latents)
        elif isinstance(module, CAbstractorConnector):
            init.trunc_normal_(module.position_embedding, std=0.02)
        elif isinstance(module, AlignVLMModel) and module.config.newline:
            init.normal_(module.image_newline, std=len(module.image_newline) ** -0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Base model
# ----------------------------------------------------------------------------------------------------------------------


class AlignVLMModel(AlignVLMPreTrainedModel):
    """Encoder, connector and decoder, without the language-model head.

    Args:
        config: the model config.
    """

    def __init__(self, config: AlignVLMConfig):
        super().__init__(config)
        self.vision_tower = AlignVLMVisionTower(config.vision_config)
        self.connector = CONNECTORS[config.connector_config["name"]](config)
        self.language_model = LlamaModel(config.text_config)
        # The row of a `padding_idx` would receive no gradient. But the padding token may also end an answer, and ALIGN
        # uses all rows as values.
        self.language_model.embed_tokens.padding_idx = None
        if config.newline:
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding table of the decoder."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Replaces the embedding table of the decoder. Its number of rows may change, ALIGN's words stay the same."""
        self.language_model.set_input_embeddings(value)
        fields = self.config.connector_config
        # None stands for all rows of the table, which may have others from now on.
        if fields["name"] == "align" and fields.get("kept_words") is None:
            fields["vocab_size"] = self.connector.num_words

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        visual_sources: torch.LongTensor | None = None,
        visual_weights: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Computes the visual tokens of tiles.

        Args:
            pixel_values: [M, 3, S, S] tiles from the image processor.
            visual_sources: [M, K, 4] indices of the features that make up each visual token, from the image
                processor. Required if tiles are joined (tiling rule anyres_max_9).
            visual_weights: [M, K, 4] weights of these features.
            image_grid_thw: [images, 3] numbers whose products are the numbers of tiles of each image. If it is given
                and tiles are joined, the visual tokens are returned image by image, as vLLM needs them.
            **kwargs: `return_dict`; other arguments are ignored.

        Returns:
            `last_hidden_state` has the encoder's features [M, N, d]. `pooler_output` has the visual tokens [M, N', D],
            or, if tiles are joined, [T, 1, D] or a list of [tokens, D] for each image.

        Raises:
            ValueError: If `visual_sources` is missing, or passed to a model that does not join tiles.
        """
        if (visual_sources is None) == self.config.newline:
            raise ValueError(
                "`visual_sources` and `visual_weights` are required by models of the tiling rule anyres_max_9 and "
                "invalid for others: use the processor of the same folder"
            )
        features = self.vision_tower(pixel_values).last_hidden_state
        embed_tokens = self.get_input_embeddings()

        def embed_words(words: slice | torch.Tensor) -> torch.Tensor:
            if isinstance(words, slice):
                words = torch.arange(words.start, words.stop, device=features.device)
            return embed_tokens(words.to(features.device))

        visual = self.connector(features, embed_words)
        if visual_sources is not None:
            # [T, 1, D]: `generate` repeats entries along the first axis for beams. With one visual token per entry, a
            # row can have any number of them.
            visual = mix_visual(visual, self.image_newline, visual_sources, visual_weights)[:, None]
            if image_grid_thw is not None:
                tokens_per_tile = is_token(visual_weights).sum(dim=-1).split(image_grid_thw.prod(dim=-1).tolist())
                visual = list(visual[:, 0].split([int(tokens.sum()) for tokens in tokens_per_tile]))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=visual)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        visual_sources: torch.LongTensor | None = None,
        visual_weights: torch.Tensor | None = None,
        **kwargs,
    ) -> AlignVLMModelOutput:
        """Runs the decoder on text in which visual tokens replace the image tokens.

        Args:
            input_ids: [B, L] token ids, with one image token per visual token, row by row and tile by tile.
            pixel_values: [M, 3, S, S] tiles of all rows; None if no row has an image.
            attention_mask: [B, L] mask that is 0 at padding, on either side.
            position_ids: [B, L] positions; by default, positions are counted without padding.
            past_key_values: cache of previous positions; called `cache` from transformers 5.24 on.
            inputs_embeds: [B, L, D] embeddings that replace `input_ids` and already contain the visual tokens.
            mm_encoder_outputs: {"image": output of `get_image_features`}, which replaces `pixel_values`.
            visual_sources: [M, K, 4] indices; see `get_image_features`.
            visual_weights: [M, K, 4] weights; see `get_image_features`.
            **kwargs: arguments for the decoder and its attention.

        Returns:
            The output of the decoder, with the visual tokens in `image_hidden_states`.

        Raises:
            ValueError: If the inputs contradict each other, or the numbers of image tokens and visual tokens differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either `input_ids` or `inputs_embeds`, not both")
        # Compute the visual tokens, unless the caller has done so.
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("pass either `pixel_values` or their `mm_encoder_outputs`, not both")
            encoded = self.get_image_features(pixel_values, visual_sources, visual_weights, return_dict=True)
        visual = None if encoded is None else encoded.pooler_output
        if isinstance(visual, list | tuple):
            visual = torch.cat([features.flatten(0, -2) for features in visual])
        # Embed the text and insert the visual tokens.
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if visual is not None:
                inputs_embeds = self.place_visual_tokens(input_ids, inputs_embeds, visual)
            elif is_empty(kwargs.get("cache") if past_key_values is None else past_key_values):
                check_counts(input_ids == self.config.image_token_id, num_visual=0)
        elif visual is not None:
            raise ValueError("`pixel_values` require `input_ids`, which mark the places of the visual tokens")
        # With a cache, the mask also covers earlier positions; keep only the positions of the new tokens.
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **if_given(past_key_values=past_key_values),
            **kwargs,
        )
        return AlignVLMModelOutput(**outputs, image_hidden_states=visual)

    def place_visual_tokens(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, visual: torch.Tensor
    ) -> torch.Tensor:
        """Returns `inputs_embeds` [B, L, D] with the image tokens replaced by the visual tokens, in order."""
        visual = visual.flatten(0, -2).to(inputs_embeds.device, inputs_embeds.dtype)
        is_image = input_ids == self.config.image_token_id
        check_counts(is_image, len(visual))
        return inputs_embeds.masked_scatter(is_image.to(inputs_embeds.device)[..., None], visual)


def mix_visual(
    features: torch.Tensor, newline: torch.Tensor, sources: torch.LongTensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mixes features into visual tokens.

    Args:
        features: [M, N', D] features of all tiles.
        newline: [D] embedding of the end of a row.
        sources: [M, K, 4] indices of features, counted from the tile's first one; -2^31 stands for `newline`.
        weights: [M, K, 4] weights of the sources; all zero in slots without a visual token.

    Returns:
        [T, D] sums over k of weights[..., k] * feature[sources[..., k]], tile by tile.
    """
    sources, weights = sources.to(features.device), weights.to(features.device, torch.float32)
    num_tiles, features_per_tile = features.shape[:2]
    first = torch.arange(num_tiles, device=features.device)[:, None, None] * features_per_tile
    # The newline is the last row.
    rows = torch.cat([features.flatten(0, 1), newline[None].to(features)])
    index = torch.where(sources == _NEWLINE, len(rows) - 1, first + sources)
    has_token = is_token(weights)
    mixed = (rows[index[has_token]].float() * weights[has_token][..., None]).sum(dim=1)
    return mixed.to(features.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Complete model
# ----------------------------------------------------------------------------------------------------------------------


class AlignVLMForConditionalGeneration(AlignVLMPreTrainedModel, AlignVLMGenerationMixin):
    """AlignVLM with a language-model head, for generation and training.

    Args:
        config: the model config.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = LlamaForCausalLM._tp_plan

    def __init__(self, config: AlignVLMConfig):
        super().__init__(config)
        self.model = AlignVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding table of the decoder."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Replaces the embedding table of the decoder."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the language-model head."""
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Computes the visual tokens of tiles; see `AlignVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_logits: bool | None = None,
        visual_sources: torch.LongTensor | None = None,
        visual_weights: torch.Tensor | None = None,
        **kwargs,
    ) -> AlignVLMCausalLMOutput:
        """Computes the logits of the next token at every position and, with labels, the loss.

        Args:
            input_ids: see `AlignVLMModel.forward`.
            pixel_values: see `AlignVLMModel.forward`.
            attention_mask: see `AlignVLMModel.forward`.
            position_ids: see `AlignVLMModel.forward`.
            past_key_values: see `AlignVLMModel.forward`.
            cache: the same; `generate` looks for this name from transformers 5.24 on.
            inputs_embeds: see `AlignVLMModel.forward`.
            mm_encoder_outputs: see `AlignVLMModel.forward`.
            labels: [B, L] token at each position, or -100 if it is excluded from the loss (prompt, padding). They are
                not shifted; the shift by one happens here. Image tokens are always excluded: they are the places of
                visual tokens, which the model does not predict.
            logits_to_keep: number of positions at the end to compute logits for (0: all), or their indices.
            num_items_in_batch: divisor of the summed loss, if gradients are accumulated over several batches; by
                default the number of labels in this batch.
            return_logits: whether to compute logits together with a loss. By default, in training mode, they are only
                computed if the caller reads them: the loss needs only those before a label, which are few compared to
                thousands of visual tokens.
            visual_sources: see `AlignVLMModel.get_image_features`.
            visual_weights: see `AlignVLMModel.get_image_features`.
            **kwargs: arguments for the decoder and its attention. `shift_labels` are [B, L] labels that are shifted
                already, as trainers pass them if they split sequences over devices.

        Returns:
            Loss, logits, cache, and the outputs of the decoder.
        """
        # As a named argument, it would be one of the labels that transformers' Trainer wants to evaluate a batch.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **if_given(past_key_values=past_key_values, cache=cache),
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            visual_sources=visual_sources,
            visual_weights=visual_weights,
            **kwargs,
        )
        # The loss computes its own logits, only where there are labels. Logits for the caller are optional.
        hidden = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED_LABEL)
        loss = None if shift_labels is None else self.label_loss(hidden, shift_labels, num_items_in_batch)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # torch.compile cannot trace the delayed form.
        delay = return_logits is None and loss is not None and self.training and not torch.compiler.is_compiling()
        logits = self.lm_head(hidden[:, kept]) if return_logits is not False and not delay else None
        # Its cache has another name from transformers 5.24 on.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        if not delay:
            return AlignVLMCausalLMOutput(loss=loss, logits=logits, **others)
        output = AlignVLMTrainingOutput(loss=loss)
        for name, value in {"logits": DelayedLogits(self.lm_head, hidden[:, kept]), **others}.items():
            output[name] = value
        return output

    def label_loss(
        self, hidden: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the sum of -log p(label) divided by the number of labels; 0 if there are none.

        Args:
            hidden: [B, L, D] last hidden states.
            shift_labels: [B, L] the token after each position, or -100.
            num_items_in_batch: divisor; None is the number of labels.
        """
        targets = shift_labels.to(hidden.device)
        has_label = (targets != _IGNORED_LABEL) & (targets != self.config.image_token_id)
        # Compute logits only where there is a label: visual tokens and prompts have none.
        logits = self.lm_head(hidden[has_label]).float()
        total = F.cross_entropy(logits, targets[has_label], reduction="sum")
        count = has_label.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


__all__ = ["AlignVLMForConditionalGeneration", "AlignVLMModel", "AlignVLMPreTrainedModel"]
