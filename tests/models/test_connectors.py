"""Connectors against PyTorch code written from the papers; Perceiver and C-Abstractor against transformers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.idefics2.configuration_idefics2 import Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.regnet.configuration_regnet import RegNetConfig
from transformers.models.regnet.modeling_regnet import RegNetYLayer

from alignvlm_jax.models import connectors
from alignvlm_jax.ops.dense_align import dense_align
from tests.ops import dense

D_IN, D_OUT, VOCAB = 12, 16, 40


def _random_params(module, *inputs):
    """Returns random parameters, also for norms and biases, whose initial ones and zeros would hide mistakes."""
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs))["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten([jax.random.normal(key, leaf.shape) * 0.5 for key, leaf in zip(keys, leaves, strict=True)])


def _inputs(num_features=9):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, num_features, D_IN)).astype(np.float32)
    embedding = rng.normal(size=(VOCAB, D_OUT)).astype(np.float32)
    return jnp.asarray(features), jnp.asarray(embedding)


def _run(config, *inputs):
    """Returns the module, its random parameters, the same in PyTorch and float64, and the output."""
    module = connectors.make_connector(config, output_size=D_OUT, dtype="float32")
    params = _random_params(module, *inputs)
    torch_params = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), dtype=torch.float64), params)
    return module, params, torch_params, jax.jit(module.apply)({"params": params}, *inputs)


def _wide(*arrays):
    return [torch.tensor(np.asarray(array), dtype=torch.float64) for array in arrays]


def _assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def _align(features, embedding, p):
    """Computes the distribution over the vocabulary, as in the paper's equation."""
    norm = torch.nn.functional.layer_norm
    hidden = features @ p["w1"]["kernel"] + p["w1"]["bias"]
    hidden = norm(hidden, (D_OUT,), p["hidden_norm"]["scale"], p["hidden_norm"]["bias"])
    logits = norm(hidden @ p["w2"].T, (VOCAB,), p["vocab_norm_scale"], p["vocab_norm_bias"])
    return torch.softmax(logits, -1)


def test_align_matches_the_papers_formula_in_value_and_gradient():
    features, embedding = _inputs()
    module, params, wide, output = _run(connectors.AlignConfig(), features, embedding)
    for leaf in jax.tree.leaves(wide):
        leaf.requires_grad_(True)
    wide_features, wide_embedding = _wide(features, embedding)
    wide_embedding.requires_grad_(True)
    p = _align(wide_features, wide_embedding, wide)
    _assert_close(output.tokens, p @ wide_embedding)
    _assert_close(output.entropy, -(p * p.log()).sum(-1))

    cotangent = np.random.default_rng(2).normal(size=output.tokens.shape)
    ((p @ wide_embedding) * torch.tensor(cotangent)).sum().backward()

    def loss(params, embedding):
        return jnp.sum(module.apply({"params": params}, features, embedding).tokens * cotangent)

    ours, dembedding = jax.jit(jax.grad(loss, (0, 1)))(params, embedding)
    theirs = jax.tree.map(lambda leaf: leaf.grad.numpy(), wide)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(got - expected) <= 1e-4 * np.linalg.norm(expected)
    # The text embedding gets a gradient through the connector.
    assert np.linalg.norm(dembedding - wide_embedding.grad.numpy()) <= 1e-4 * np.linalg.norm(dembedding)


def test_the_dense_form_matches_the_papers_formula():
    """tests/ops compares the streaming form with the dense form. Here the dense form is compared with PyTorch."""
    features, embedding = _inputs()
    _, params, wide, _ = _run(connectors.AlignConfig(), features, embedding)
    wide_features, wide_embedding = _wide(features, embedding)
    expected = _align(wide_features, wide_embedding, wide) @ wide_embedding
    weights = dict(
        w1=params["w1"]["kernel"],
        w1_bias=params["w1"]["bias"],
        hidden_scale=params["hidden_norm"]["scale"],
        hidden_bias=params["hidden_norm"]["bias"],
        w2=params["w2"],
        vocab_scale=params["vocab_norm_scale"],
        vocab_bias=params["vocab_norm_bias"],
        text_embedding=embedding,
    )
    tokens = dense.in_float64(
        lambda features, *values: dense_align(features, **dict(zip(weights, values, strict=True))),
        features,
        *weights.values(),
    )
    np.testing.assert_allclose(tokens, expected.numpy(), rtol=1e-10)


def test_align_may_use_fewer_words_than_the_table_has():
    features, embedding = _inputs()
    _, params, _, output = _run(connectors.AlignConfig(vocab_size=VOCAB - 3), features, embedding)
    assert params["w2"].shape == (VOCAB - 3, D_OUT)
    # The same weights with a table of exactly these words.
    expected = jax.jit(connectors.make_connector(connectors.AlignConfig(), output_size=D_OUT, dtype="float32").apply)(
        {"params": params}, features, embedding[:-3]
    )
    np.testing.assert_array_equal(output.tokens, expected.tokens)


def test_aligns_scale_is_initialized_from_the_config():
    features, embedding = _inputs()
    module = connectors.make_connector(connectors.AlignConfig(vocab_scale_init=3.0), output_size=D_OUT, dtype="float32")
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), features, embedding))["params"]
    assert np.all(params["vocab_norm_scale"] == 3.0)


def test_mlp_matches_torch():
    features, embedding = _inputs()
    _, _, p, output = _run(connectors.MLPConfig(), features, embedding)
    (x,) = _wide(features)
    hidden = torch.nn.functional.gelu(x @ p["linear_in"]["kernel"] + p["linear_in"]["bias"])
    _assert_close(output.tokens, hidden @ p["linear_out"]["kernel"] + p["linear_out"]["bias"])
    assert output.entropy is None


def test_ovis_matches_torch():
    features, embedding = _inputs()
    _, _, p, output = _run(connectors.OvisConfig(num_words=7), features, embedding)
    (x,) = _wide(features)
    z = torch.nn.functional.layer_norm(x @ p["head"]["kernel"], (7,), p["word_norm"]["scale"], p["word_norm"]["bias"])
    _assert_close(output.tokens, torch.softmax(z, -1) @ p["table"])


@pytest.mark.parametrize("grid", [4, 7])  # 7 columns are padded to 8, as 27 are to 28 at full size
def test_h_reducer_matches_torch(grid):
    features, embedding = _inputs(grid * grid)
    _, _, p, output = _run(connectors.HReducerConfig(window=4), features, embedding)
    (x,) = _wide(features)
    image = torch.nn.functional.pad(x.reshape(2, grid, grid, D_IN).permute(0, 3, 1, 2), (0, -grid % 4))
    weight = p["reduce"]["kernel"].reshape(4, D_IN, D_IN).permute(2, 1, 0)[:, :, None]  # out, in, 1, 4
    reduced = torch.nn.functional.conv2d(image, weight, p["reduce"]["bias"], stride=(1, 4))
    tokens = reduced.permute(0, 2, 3, 1).reshape(2, -1, D_IN)
    _assert_close(output.tokens, tokens @ p["project"]["kernel"] + p["project"]["bias"])


def test_perceiver_matches_idefics2():
    features, embedding = _inputs()
    config = connectors.PerceiverConfig(
        num_latents=5, depth=2, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=20
    )
    _, p, _, output = _run(config, features, embedding)
    theirs = Idefics2Connector(
        Idefics2Config(
            vision_config={"hidden_size": D_IN},
            text_config={"model_type": "mistral", "hidden_size": D_OUT, "intermediate_size": 20, "hidden_act": "silu"},
            perceiver_config={
                "hidden_size": D_OUT,
                "resampler_n_latents": 5,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 6,
                "num_key_value_heads": 2,
            },
        )
    ).eval()

    def gated(prefix, tree):
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        return {f"{prefix}.{names[name]}.weight": tree[name]["kernel"].T for name in names}

    state = gated("modality_projection", p["modality_projection"])
    state["perceiver_resampler.latents"] = p["latents"]
    state["perceiver_resampler.norm.weight"] = p["final_norm"]["scale"]
    for index in range(2):
        layer, prefix = p[f"layer_{index}"], f"perceiver_resampler.layers.{index}"
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        state |= {f"{prefix}.self_attn.{names[n]}.weight": layer[n]["kernel"].T for n in names}
        state |= gated(f"{prefix}.mlp", layer["mlp"])
        norms = {
            "latents_norm": "input_latents_norm",
            "context_norm": "input_context_norm",
            "mlp_norm": "post_attention_layernorm",
        }
        state |= {f"{prefix}.{norms[n]}.weight": layer[n]["scale"] for n in norms}
    theirs.load_state_dict({key: torch.tensor(np.asarray(value)) for key, value in state.items()})
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(features)), torch.ones(2, 9, dtype=torch.bool))
    _assert_close(output.tokens, expected)


class _LayerNorm2d(torch.nn.LayerNorm):
    """LayerNorm over channels, which timm puts after each convolution of HoneyBee's blocks.

    transformers' RegNet has a BatchNorm there.
    """

    def forward(self, inputs):
        return super().forward(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _regnet_layer(p, width, channels):
    """Returns transformers' RegNet "Y" layer, changed to HoneyBee's: depthwise, with LayerNorm and timm's squeeze."""
    config = RegNetConfig(groups_width=1, hidden_act="silu")
    layer = RegNetYLayer(config, width, channels)
    squeeze = layer.layer[2].attention
    squeeze[1] = torch.nn.SiLU()
    convs = {"conv_in": layer.layer[0], "depthwise": layer.layer[1], "conv_out": layer.layer[3]}
    if width != channels:
        convs["shortcut"] = layer.shortcut
    for name, conv in convs.items():
        kernel = p[name].permute(2, 0, 1)[:, None] if name == "depthwise" else p[name]["kernel"].T[:, :, None, None]
        norm = _LayerNorm2d(channels)
        norm.load_state_dict({"weight": p[f"{name}_norm"]["scale"], "bias": p[f"{name}_norm"]["bias"]})
        conv.convolution.weight.data = kernel
        conv.normalization = norm
    for index, name in ((0, "squeeze"), (2, "excite")):
        assert squeeze[index].weight.shape[:2] == p[name]["kernel"].T.shape
        squeeze[index].weight.data = p[name]["kernel"].T[:, :, None, None]
        squeeze[index].bias.data = p[name]["bias"]
    return layer.double()


# From 5 columns to 3 the pooling windows overlap, as from 27 to 12 at full size.
@pytest.mark.parametrize(("grid", "side"), [pytest.param(4, 2, marks=pytest.mark.large), (5, 3), (3, 3)])
def test_c_abstractor_matches_honeybee_in_value_and_gradient(grid, side):
    features, embedding = _inputs(grid * grid)
    config = connectors.CAbstractorConfig(num_tokens=side * side, depth=2, hidden_size=8)
    module, params, p, output = _run(config, features, embedding)
    x, _ = _wide(features, embedding)
    x.requires_grad_(True)
    hidden = (x + p["position_embedding"]).reshape(2, grid, grid, D_IN).permute(0, 3, 1, 2)
    hidden = _regnet_layer(p["before_1"], 8, 8)(_regnet_layer(p["before_0"], D_IN, 8)(hidden))
    hidden = torch.nn.AdaptiveAvgPool2d(side)(hidden)
    hidden = _regnet_layer(p["after_1"], 8, 8)(_regnet_layer(p["after_0"], 8, 8)(hidden))
    hidden = hidden.flatten(2).transpose(1, 2) @ p["readout_in"]["kernel"] + p["readout_in"]["bias"]
    expected = torch.nn.functional.silu(hidden) @ p["readout_out"]["kernel"] + p["readout_out"]["bias"]
    _assert_close(output.tokens, expected)

    cotangent = np.random.default_rng(2).normal(size=output.tokens.shape)
    (theirs,) = torch.autograd.grad(expected, x, torch.tensor(cotangent))

    def loss(x):
        return jnp.sum(module.apply({"params": params}, x, embedding).tokens * cotangent)

    ours = jax.jit(jax.grad(loss))(features)
    assert np.linalg.norm(ours - theirs.numpy()) <= 1e-4 * np.linalg.norm(theirs)
