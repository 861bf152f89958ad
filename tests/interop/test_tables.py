"""The weight tables cover every parameter once, and their transforms match torch's layers."""

import zlib

import flax.linen as nn
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from alignvlm_jax.interop import tables
from alignvlm_jax.models.alignvlm import AlignVLMConfig, parameter_shapes
from alignvlm_jax.models.connectors import (
    AlignConfig,
    CAbstractorConfig,
    HReducerConfig,
    MLPConfig,
    OvisConfig,
    PerceiverConfig,
)
from alignvlm_jax.models.layers import Dense
from alignvlm_jax.models.weight_table import CONV, TRANSPOSED, WINDOW_CONV
from tests.tiny_models import tiny_language, tiny_vision

CONNECTORS = {
    "align": AlignConfig(),
    "align_plain": AlignConfig(use_bias=False, vocab_size=40),
    "mlp": MLPConfig(),
    "ovis": OvisConfig(num_words=20),
    "h_reducer": HReducerConfig(window=3),
    "c_abstractor": CAbstractorConfig(num_tokens=9, depth=2, hidden_size=8),
    "perceiver": PerceiverConfig(num_latents=3, depth=2, num_heads=2, num_kv_heads=1, head_dim=4),
}


def tiny_config(connector, *, tied: bool = True) -> AlignVLMConfig:
    vision = tiny_vision(20, patch_size=5, hidden_size=12, intermediate_size=20, num_layers=2)
    language = tiny_language(48, hidden_size=16, intermediate_size=24, num_layers=3, tie_word_embeddings=tied)
    return AlignVLMConfig(vision, connector, language)


def unboxed_shapes(config: AlignVLMConfig) -> dict[str, tuple[int, ...]]:
    boxed = parameter_shapes(config)
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(nn.unbox(boxed)).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONNECTORS)
def test_every_parameter_has_one_row_with_a_unique_key(name, tied):
    config = tiny_config(CONNECTORS[name], tied=tied)
    rows = tables.alignvlm(config)
    assert sorted(row.path for row in rows) == sorted(unboxed_shapes(config))
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("model.") or key == "lm_head.weight" for key in keys)


def test_documented_keys_do_not_change():
    """Folders that were exported earlier depend on these keys."""
    keys = {row.key for row in tables.alignvlm(tiny_config(AlignConfig(), tied=False))}
    assert keys >= {
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.vision_tower.vision_model.encoder.layers.{layer}.self_attn.q_proj.bias",
        "model.vision_tower.vision_model.post_layernorm.weight",
        "model.connector.w2.weight",
        "model.connector.vocab_norm.bias",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.{layer}.mlp.down_proj.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("name", CONNECTORS)
def test_transforms_are_inverse_and_predict_the_tensors_shape(name):
    config = tiny_config(CONNECTORS[name])
    shapes = unboxed_shapes(config)
    for row in tables.alignvlm(config):
        shape = shapes[row.path][1 if "{layer}" in row.key else 0 :]
        array = np.random.default_rng(zlib.crc32(row.path.encode())).normal(size=shape)
        tensor = row.transform.to_torch(array)
        assert tensor.shape == row.transform.torch_shape(shape), row
        np.testing.assert_array_equal(row.transform.to_jax(tensor), array)


@pytest.mark.parametrize(
    ("transform", "layer", "inputs"),
    [
        (TRANSPOSED, torch.nn.Linear(6, 4, bias=False), (3, 6)),
        (CONV, torch.nn.Conv2d(3, 5, kernel_size=(4, 4), bias=False), (2, 3, 4, 4)),
        (WINDOW_CONV, torch.nn.Conv2d(6, 6, kernel_size=(1, 3), bias=False), (2, 6, 1, 3)),
    ],
)
def test_a_converted_kernel_computes_the_same_as_torchs_layer(transform, layer, inputs):
    inputs = torch.randn(inputs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = layer(inputs).numpy().reshape(inputs.shape[0], -1)
    kernel = transform.to_jax(layer.weight.detach().numpy())
    flat = inputs.numpy().transpose(0, 2, 3, 1).reshape(len(theirs), -1) if inputs.ndim == 4 else inputs.numpy()
    ours = Dense(theirs.shape[-1], ("a", "b"), use_bias=False).apply({"params": {"kernel": kernel}}, flat)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
