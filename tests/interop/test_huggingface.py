"""SigLIP and Llama folders against transformers: what it computes is the oracle."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import huggingface
from alignvlm_jax.models.language import LanguageModel, empty_cache
from alignvlm_jax.models.vision import VisionEncoder

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def _relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def _scatter(model):
    """Random weights with random norms and biases: transformers starts those at one and zero, which hides mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


@pytest.fixture
def siglip(tmp_path):
    config = transformers.SiglipVisionConfig(
        hidden_size=24, image_size=20, patch_size=6, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2
    )
    model = _scatter(transformers.SiglipVisionModel(config))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def _llama(folder, *, tied, kv_heads, rope):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        max_position_embeddings=64,
    )
    model = _scatter(transformers.LlamaForCausalLM(config))
    model.save_pretrained(folder)
    return model


def test_siglip_features_are_those_of_transformers(siglip):
    model, folder = siglip
    config, params = huggingface.load_vision_folder(folder)
    tiles = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tiles.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    ours = VisionEncoder(config).apply({"params": params}, tiles)
    assert ours.shape == (2, 9, 24)
    assert _relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("tied", "kv_heads", "rope"), [(True, 2, PLAIN), (False, 4, PLAIN), (True, 1, LLAMA3), (False, 2, LLAMA3)]
)
def test_llama_logits_are_those_of_transformers(tmp_path, tied, kv_heads, rope):
    model = _llama(tmp_path, tied=tied, kv_heads=kv_heads, rope=rope)
    config, params = huggingface.load_language_folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40))  # beyond the original context of the llama3 case
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()

    def run(module, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = module(module.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))
        return module.logits(hidden)

    ours = LanguageModel(config).apply({"params": params}, jnp.asarray(tokens), method=run)
    assert _relative_error(ours, theirs) < 1e-4


def test_cached_decoding_equals_the_full_forward(tmp_path):
    model = _llama(tmp_path, tied=True, kv_heads=2, rope=PLAIN)
    config, params = huggingface.load_language_folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 10))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()

    def run(module, tokens, positions, cache):
        ones = jnp.ones_like(tokens)
        hidden, cache = module(module.embed(tokens), positions=positions, segment_ids=ones, cache=cache)
        return module.logits(hidden), cache

    cache, pieces = empty_cache(config, 2, 12), []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        logits, cache = LanguageModel(config).apply(
            {"params": params}, jnp.asarray(tokens[:, start:stop]), positions, cache, method=run
        )
        pieces.append(logits)
    assert _relative_error(jnp.concatenate(pieces, axis=1), theirs) < 1e-4


def test_folders_written_here_load_in_transformers_with_the_same_tensors(siglip, tmp_path):
    model, folder = siglip
    huggingface.save_vision_folder(tmp_path / "out", *huggingface.load_vision_folder(folder), dtype="float32")
    again = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out")
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if not key.split("vision_model.")[-1].startswith("head.")
    }
    got = again.state_dict()
    assert set(expected) <= set(got)
    assert all(torch.equal(expected[key], got[key]) for key in expected)

    llama = _llama(tmp_path / "llama", tied=False, kv_heads=2, rope=LLAMA3)
    huggingface.save_language_folder(
        tmp_path / "llama_out", *huggingface.load_language_folder(tmp_path / "llama"), dtype="float32"
    )
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama_out")
    assert again.config.rope_parameters == llama.config.rope_parameters
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in llama.state_dict().items())


def test_all_problems_are_reported_together(tmp_path):
    _llama(tmp_path, tied=True, kv_heads=2, rope=PLAIN)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64, "num_hidden_layers": 2}))
    with pytest.raises(UserError) as error:
        huggingface.load_language_folder(tmp_path)
    assert "model.layers.2.mlp.up_proj.weight is not part of this model" in str(error.value)
    assert "model.layers.{0,1}.mlp.gate_proj.weight has shape [48, 32], the config says [64, 32]" in str(error.value)


def test_a_truncated_file_and_a_folder_that_is_none(tmp_path):
    _llama(tmp_path, tied=True, kv_heads=2, rope=PLAIN)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        huggingface.load_language_folder(tmp_path)
    with pytest.raises(UserError, match="has no config.json"):
        huggingface.load_language_folder(tmp_path / "nowhere")
