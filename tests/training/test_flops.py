"""Compares the FLOP formulas with XLA's own count (`compiled.cost_analysis()`) of programs without extra work.

XLA counts the operations of a program as written: the body of a loop once, recomputation in a backward pass again, and
masked scores like all others. The formulas count the operations that are needed. So these tests replace the kernels of
the shipped model and train step by plain ones. Layers are unrolled, ALIGN and the loss are dense, the loss is computed
at answers only, and nothing is rematerialized or padded. Attention runs per segment and, if causal, in blocks of
queries over the keys up to the block's end; the few extra pairs of a block are within the tolerance. Programs are
compiled but not run.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax.models import connectors, language, vision
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, example_batch, parameter_shapes, tokens_per_tile
from alignvlm_jax.ops.dense_align import dense_vocabulary_attention
from alignvlm_jax.ops.vocabulary_attention import VocabularySummary
from alignvlm_jax.training import train_step
from alignvlm_jax.training.flops import train_flops
from tests.ops import dense
from tests.training.batches import stage

# The elementwise operations that the formulas omit take less than this at the sizes below.
TOLERANCE = 0.05

VISION = vision.VisionConfig(
    image_size=112, patch_size=14, hidden_size=576, intermediate_size=2048, num_layers=2, num_heads=8
)
LANGUAGE = language.LanguageConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1536, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128
)
CONNECTORS = {
    "align": connectors.AlignConfig(vocab_size=4000),
    "mlp": connectors.MLPConfig(),
    "perceiver": connectors.PerceiverConfig(depth=2),
    "ovis": connectors.OvisConfig(num_words=3000),
    "h_reducer": connectors.HReducerConfig(),
    "c_abstractor": connectors.CAbstractorConfig(num_tokens=16, hidden_size=512),
}
ROWS, TILES, SEGMENTS, ANSWERS = 2, 3, (128, 384), 100
BLOCK = 64
LENGTH = sum(SEGMENTS)
SIZES = dict(
    tiles=ROWS * TILES,
    tokens=ROWS * LENGTH,
    answer_tokens=ROWS * ANSWERS,
    squared_lengths=ROWS * sum(length**2 for length in SEGMENTS),
)


def model_config(connector="align"):
    return AlignVLMConfig(VISION, CONNECTORS[connector], LANGUAGE)


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Replaces the kernels of the model by those of this file; see above."""
    monkeypatch.setattr(vision, "packed_attention", segment_attention)
    monkeypatch.setattr(language, "packed_attention", segment_attention)
    monkeypatch.setattr(
        connectors.perceiver,
        "cached_attention",
        lambda q, k, v, visible: softmax_attention(q, k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)),
    )
    monkeypatch.setattr(connectors.align, "vocabulary_attention", vocabulary_attention_with_entropy)
    monkeypatch.setattr(connectors.ovis, "vocabulary_attention", vocabulary_attention_with_entropy)
    monkeypatch.setattr(language, "linear_cross_entropy", dense_loss)
    monkeypatch.setattr(nn, "scan", functools.partial(nn.scan, unroll=2))


def softmax_attention(query, key, value, mask=None):
    """Computes grouped-query attention with plain products; `mask` is [queries, keys]."""
    batch, length, heads, width = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, width)
    scores = jnp.einsum("blgrh,bkgh->bgrlk", query, key)
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e30))
    return jnp.einsum("bgrlk,bkgh->blgrh", weights, value).reshape(batch, length, heads, width)


def segment_attention(query, key, value, *, causal, **options):
    """Computes attention within each of `SEGMENTS`, without the masked blocks."""
    if not causal:
        return softmax_attention(query, key, value)
    blocks, start = [], 0
    # Lengths other than LENGTH occur only while shapes are evaluated.
    for segment in SEGMENTS if query.shape[1] == LENGTH else [query.shape[1]]:
        for first in range(start, start + segment, BLOCK):
            stop = min(first + BLOCK, start + segment)
            mask = jnp.arange(first, stop)[:, None] >= jnp.arange(start, stop)
            keys = slice(start, stop)
            blocks.append(softmax_attention(query[:, first:stop], key[:, keys], value[:, keys], mask))
        start += segment
    return jnp.concatenate(blocks, axis=1)


def vocabulary_attention_with_entropy(q, keys, scale, bias, values, **options):
    mixed = dense_vocabulary_attention(q, keys, scale, bias, values)
    return mixed, VocabularySummary(entropy=jnp.zeros(q.shape[:-1]))


def dense_loss(hidden, head, targets, weights, **options):
    answers = slice(0, ANSWERS)
    hidden, targets, weights = (array[:, answers] for array in (hidden, targets, weights))
    return dense.linear_cross_entropy(hidden, head, targets, weights), jnp.sum(weights)


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def packed_shapes():
    return jax.eval_shape(lambda: example_batch(model_config(), rows=ROWS, tiles=TILES, length=LENGTH))


def unboxed_shapes(config):
    return nn.unbox(parameter_shapes(config))


def forward_flops(config, method, *arguments):
    """Returns XLA's count of one part of the model."""
    params = unboxed_shapes(config)
    return xla_flops(lambda p, *a: AlignVLM(config).apply({"params": p}, *a, method=method), params, *arguments)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_encoder_flops_match_xla():
    config, batch = model_config(), packed_shapes()
    counted = forward_flops(config, "encode_features", batch["tiles"], batch["tile_valid_hw"])
    assert train_flops(config, (), **SIZES).encoder == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("name", CONNECTORS)
def test_connector_flops_match_xla(name):
    config = model_config(name)
    features = floats(ROWS * TILES, VISION.num_patches, VISION.hidden_size)

    def connect(model, features):
        return model.connector(features, model.language.embedding).tokens

    counted = forward_flops(config, connect, features)
    assert train_flops(config, (), **SIZES).connector == pytest.approx(counted, rel=TOLERANCE)


def decoder_flops():
    """Returns XLA's count of the decoder, without embedding and logits."""
    batch = packed_shapes()

    def decode(model, hidden, batch):
        return model.language(hidden, positions=batch["positions"], segment_ids=batch["segment_ids"])[0]

    return forward_flops(model_config(), decode, floats(ROWS, LENGTH, LANGUAGE.hidden_size), batch)


def test_decoder_flops_match_xla(monkeypatch):
    counted = decoder_flops()
    formula = train_flops(model_config(), (), **SIZES).decoder
    assert formula == pytest.approx(counted, rel=TOLERANCE)

    # One segment with the same number of tokens differs only in attention: this checks the formula's n² / 2.
    monkeypatch.setitem(globals(), "SEGMENTS", (LENGTH,))
    longer = train_flops(model_config(), (), **{**SIZES, "squared_lengths": ROWS * LENGTH**2}).decoder
    assert longer - formula == pytest.approx(decoder_flops() - counted, rel=TOLERANCE)


def test_loss_flops_match_xla():
    hidden, batch = floats(ROWS, LENGTH, LANGUAGE.hidden_size), packed_shapes()

    def loss(model, hidden, batch):
        return model.language.loss(hidden, batch["targets"], batch["loss_weights"])[0]

    counted = forward_flops(model_config(), loss, hidden, batch)
    assert train_flops(model_config(), (), **SIZES).loss == pytest.approx(counted, rel=TOLERANCE)


ALL = ("vision", "connector", "language")


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("align", ALL),
        ("align", ("connector", "language")),  # stage 3
        *(
            pytest.param(name, parts, marks=pytest.mark.large)
            for name, parts in [
                ("align", ("connector",)),
                ("align", ("language",)),
                ("align", ("vision",)),
                ("mlp", ALL),
                ("perceiver", ALL),
                ("perceiver", ("connector", "language")),
                ("ovis", ALL),
                ("h_reducer", ALL),
                ("c_abstractor", ALL),
            ]
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_train_step_flops_match_xla(name, trainable):
    """Counts the complete shipped step, optimizer included."""
    config, stage_config = model_config(name), stage(trainable=trainable)
    state = jax.eval_shape(functools.partial(train_step.create_state, stage_config), unboxed_shapes(config))
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), packed_shapes())
    assert tokens_per_tile(config) * TILES < LENGTH, "the text must have a place for every visual token"
    inputs = {name: batch[name] for name in train_step.FIELDS}
    counted = xla_flops(train_step.make_train_step(config, stage_config), state, inputs)
    assert train_flops(config, trainable, **SIZES).total == pytest.approx(counted, rel=TOLERANCE)


def test_a_frozen_part_is_cheaper():
    costs = {trained: train_flops(model_config(), trained, **SIZES) for trained in [(), ALL, ALL[1:], ALL[1:2]]}
    forward, everything, stage_3, connector = costs.values()
    assert stage_3.encoder == connector.encoder == forward.encoder < everything.encoder
    assert connector.decoder == pytest.approx(forward.decoder * 2, rel=0.2), "no gradients of its weights"
    assert everything.total < 3 * forward.total, "the pixels need no gradient"
