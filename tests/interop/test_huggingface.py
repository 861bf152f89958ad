"""SigLIP and Llama folders against transformers, in the variants found in practice."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import huggingface
from alignvlm_jax.interop.huggingface_config import (
    llama_config,
    read_language_config,
    read_vision_config,
    siglip_config,
)
from alignvlm_jax.models.language import LanguageModel, empty_cache
from alignvlm_jax.models.vision import VisionEncoder
from tests.interop import oracle
from tests.interop.oracle import LLAMA3, PLAIN, relative_error


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in remove}))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    safetensors.torch.save_file(edit(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})


# SigLIP


def write_vision_alone(folder, **changes):
    return oracle.siglip(folder, **changes)


def write_with_inner_vision_model(folder, **changes):
    """Writes the layout of transformers up to 5.0 and of the folders on the Hub."""
    model = oracle.siglip(folder, **changes)
    edit_tensors(folder, lambda tensors: {f"vision_model.{key}": tensor for key, tensor in tensors.items()})
    return model


def write_both_towers(folder, **changes):
    """Writes a complete SigLIP with both towers."""
    text = dict(vocab_size=20, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = transformers.SiglipConfig(text_config=text, vision_config=oracle.siglip_config(**changes).to_dict())
    model = oracle.randomize(transformers.SiglipModel(config))
    model.save_pretrained(folder)
    return model.vision_model


def write_both_towers_without_defaults(folder, **changes):
    """Writes a folder as on the Hub: the config omits transformers' defaults, and the tensors include a buffer."""
    model = write_both_towers(folder, hidden_size=768, intermediate_size=40, num_hidden_layers=1, **changes)
    non_defaults = dict(intermediate_size=40, num_hidden_layers=1, image_size=20, patch_size=6)
    edit_config(folder, vision_config={"model_type": "siglip_vision_model", **non_defaults})
    ids = {"vision_model.embeddings.position_ids": torch.arange(9)[None]}
    edit_tensors(folder, lambda tensors: {**tensors, **ids})
    return model


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (write_vision_alone, {}),
        (write_vision_alone, {"vision_use_head": False}),
        (write_with_inner_vision_model, {"image_size": 28, "patch_size": 14}),
        (write_with_inner_vision_model, {"image_size": 32, "patch_size": 16, "vision_use_head": False}),
        (write_both_towers, {"num_attention_heads": 3}),
        (write_both_towers_without_defaults, {"num_attention_heads": 12}),
    ],
)
def test_siglip_features_match_transformers(tmp_path, write, changes):
    model = write(tmp_path, **changes)
    config, params = huggingface.load_vision_folder(tmp_path)
    side = model.config.image_size
    tiles = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tiles.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    ours = jax.jit(VisionEncoder(config).apply)({"params": params}, tiles)
    assert ours.shape == (2, (side // model.config.patch_size) ** 2, model.config.hidden_size)
    assert relative_error(ours, theirs) < 1e-4


def test_missing_config_keys_default_as_in_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip", "vision_config": {"hidden_size": 24}}')
    expected = siglip_config(read_vision_config(tmp_path), "float32")
    theirs = transformers.SiglipVisionConfig(hidden_size=24).to_dict()
    assert {key: theirs[key] for key in expected if key in theirs} | {
        "architectures": ["SiglipVisionModel"],
        "dtype": "float32",
        "vision_use_head": False,
    } == expected
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    expected = llama_config(read_language_config(tmp_path), "float32")
    theirs = transformers.LlamaConfig().to_dict()
    assert {key: theirs[key] for key in expected} | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    } == expected


# Llama


def run_language(config, params, tokens):
    """Returns the logits of the JAX model, computed without a cache."""

    def run(module, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = module(module.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))
        return module.logits(hidden)

    apply = jax.jit(lambda params, tokens: LanguageModel(config).apply({"params": params}, tokens, method=run))
    return apply(params, jnp.asarray(tokens))


def transformers_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens))).logits.float().numpy()


def use_old_rope_keys(folder):
    """Rewrites the rotary settings as two top-level keys, as in transformers 4."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    edit_config(folder, remove=("rope_parameters",), rope_theta=theta, rope_scaling=scaling, torch_dtype="bfloat16")


def use_oldest_rope_keys(folder):
    """Renames `rope_type` to `type`, as in the first files of Llama 3.1."""
    use_old_rope_keys(folder)
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    edit_config(folder, rope_scaling={"type": scaling.pop("rope_type"), **scaling})


def remove_head_dim(folder):
    edit_config(folder, remove=("head_dim",))


def store_tied_lm_head(folder):
    def add(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    edit_tensors(folder, add)


def add_rotary_buffers(folder):
    """Adds rotary buffers, as in the oldest Llama 2 folders."""

    def add(tensors):
        buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
        return {**tensors, **buffers}

    edit_tensors(folder, add)


@pytest.mark.parametrize(
    ("changes", "edit"),
    [
        pytest.param({"rope_parameters": LLAMA3}, None, id="Llama 3.2: tied, scaled"),
        pytest.param(
            {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
            use_old_rope_keys,
            id="Llama 3.1: untied, scaled",
        ),
        pytest.param({"rope_parameters": LLAMA3}, use_oldest_rope_keys, id="scaled, oldest spelling"),
        pytest.param(
            {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36},
            use_old_rope_keys,
            id="SmolLM2",
        ),
        pytest.param({"num_key_value_heads": 4, "tie_word_embeddings": False}, add_rotary_buffers, id="Llama 2"),
        pytest.param({"num_key_value_heads": 1, "tie_word_embeddings": False}, remove_head_dim, id="multi-query"),
        pytest.param({"head_dim": 6, "rope_parameters": {**PLAIN, "rope_theta": 5e5}}, None, id="narrow heads"),
        pytest.param({}, store_tied_lm_head, id="tied, but the head is stored"),
    ],
)
def test_llama_logits_match_transformers(tmp_path, changes, edit):
    model = oracle.llama(tmp_path, **changes)
    if edit:
        edit(tmp_path)
    config, params = huggingface.load_language_folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40))  # 40 tokens, where the original context is 16
    theirs = transformers_logits(model, tokens)
    assert relative_error(run_language(config, params, tokens), theirs) < 1e-4


def test_shards_are_read_through_their_index(tmp_path):
    model = oracle.llama(tmp_path, save={"max_shard_size": "10KB"}, tie_word_embeddings=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    config, params = huggingface.load_language_folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 50, (1, 9))
    assert relative_error(run_language(config, params, tokens), transformers_logits(model, tokens)) < 1e-4


def test_cached_decoding_matches_transformers_beyond_the_original_context(tmp_path):
    model = oracle.llama(tmp_path, rope_parameters=LLAMA3)
    config, params = huggingface.load_language_folder(tmp_path)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, length) for length in (27, 19, 33)]
    decoded, lengths = 12, np.array([len(row) - 12 for row in rows])  # the original context is 16 tokens
    theirs = [transformers_logits(model, row[None])[0] for row in rows]

    def run(module, tokens, positions, segment_ids, cache):
        hidden, cache = module(module.embed(tokens), positions=positions, segment_ids=segment_ids, cache=cache)
        return module.logits(hidden), cache

    @jax.jit
    def step(*arguments):
        return LanguageModel(config).apply({"params": params}, *arguments, method=run)

    width = lengths.max()
    prompts = np.stack([np.pad(row[:length], (0, width - length)) for row, length in zip(rows, lengths, strict=True)])
    positions = np.broadcast_to(np.arange(width), prompts.shape)
    inside = (positions < lengths[:, None]).astype(np.int32)
    logits, cache = step(prompts, positions, inside, empty_cache(config, len(rows), int(width) + decoded))
    for row, length in enumerate(lengths):
        assert relative_error(logits[row, :length], theirs[row][:length]) < 1e-4
    for offset in range(decoded):
        tokens = np.stack([row[length + offset] for row, length in zip(rows, lengths, strict=True)])[:, None]
        logits, cache = step(tokens, (lengths + offset)[:, None], np.ones_like(tokens), cache)
        for row, length in enumerate(lengths):
            assert relative_error(logits[row, 0], theirs[row][length + offset]) < 1e-4


# Bfloat16


def l2_error(got, exact) -> float:
    got = np.asarray(got, np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def test_siglip_in_bfloat16_is_as_accurate_as_transformers(tmp_path):
    model = oracle.siglip(tmp_path, hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=6)
    config, params = huggingface.load_vision_folder(tmp_path)
    config = dataclasses.replace(config, dtype="bfloat16")
    tiles = np.random.default_rng(0).normal(size=(4, 20, 20, 3)).astype(np.float32)
    pixels = torch.from_numpy(tiles.transpose(0, 3, 1, 2))
    with torch.no_grad():
        exact = model(pixels).last_hidden_state.numpy()
        theirs = model.bfloat16()(pixels.bfloat16()).last_hidden_state.float().numpy()
    ours = jax.jit(VisionEncoder(config).apply)({"params": params}, jnp.asarray(tiles, jnp.bfloat16))
    print(f"SigLIP bfloat16 error: ours {l2_error(ours, exact):.4f}, transformers {l2_error(theirs, exact):.4f}")
    assert 0 < l2_error(ours, exact) <= 1.5 * l2_error(theirs, exact)
    assert l2_error(ours, exact) < 0.05


def test_llama_in_bfloat16_is_as_accurate_as_transformers(tmp_path):
    model = oracle.llama(tmp_path, rope_parameters=LLAMA3)
    config, params = huggingface.load_language_folder(tmp_path)
    config = dataclasses.replace(config, dtype="bfloat16")
    tokens = np.random.default_rng(0).integers(0, 50, (4, 40))
    exact, ours = transformers_logits(model, tokens), run_language(config, params, tokens)
    theirs = transformers_logits(model.bfloat16(), tokens)
    print(f"Llama bfloat16 error: ours {l2_error(ours, exact):.4f}, transformers {l2_error(theirs, exact):.4f}")
    assert 0 < l2_error(ours, exact) <= 1.5 * l2_error(theirs, exact)
    assert l2_error(ours, exact) < 0.05


# Export


def test_exported_folders_load_in_transformers_with_the_same_tensors(tmp_path):
    model = oracle.siglip(tmp_path / "siglip")
    config, params = huggingface.load_vision_folder(tmp_path / "siglip")
    huggingface.save_vision_folder(tmp_path / "siglip_out", config, params, dtype="float32")
    loaded = transformers.SiglipVisionModel.from_pretrained(tmp_path / "siglip_out").state_dict()
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if not key.split("vision_model.")[-1].startswith("head.")
    }
    assert set(expected) <= set(loaded)
    assert all(torch.equal(expected[key], loaded[key]) for key in expected)

    llama = oracle.llama(tmp_path / "llama", tie_word_embeddings=False, rope_parameters=LLAMA3)
    config, params = huggingface.load_language_folder(tmp_path / "llama")
    huggingface.save_language_folder(tmp_path / "llama_out", config, params, dtype="float32")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama_out")
    assert loaded.config.rope_parameters == llama.config.rope_parameters
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in llama.state_dict().items())


# Refused folders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"model_type": "siglip2_vision_model"}, "NaFlex"),
        ({"num_patches": 256}, "NaFlex"),
        ({"model_type": "clip_vision_model"}, "'clip_vision_model', expected 'siglip'"),
        ({"model_type": "alignvlm", "vision_config": {"model_type": "siglip_vision_model"}}, "is 'alignvlm', expected"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'gelu_pytorch_tanh' is supported"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"image_size": [20, 40]}, r"image_size is \[20, 40\], expected a square"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not divisible by 5 heads"),
        (
            {"patch_size": 0, "num_hidden_layers": "3"},
            "patch_size is 0, .*num_hidden_layers is '3', expected a positive",
        ),
    ],
)
def test_unsupported_vision_configs_are_refused(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**oracle.siglip_config().to_dict(), **changes}))
    with pytest.raises(UserError, match=message):
        huggingface.open_vision(tmp_path)


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn' is not supported"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "needs low_freq_factor, high_freq_factor, original_max",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias is True, .*mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ({"num_key_value_heads": 3}, "4 heads are not divisible by num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by 5 heads, and head_dim is missing"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even number"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_unsupported_language_configs_are_refused(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(UserError, match=message):
        huggingface.open_language(tmp_path)


def test_a_tied_head_that_differs_from_the_table_is_refused(tmp_path):
    oracle.llama(tmp_path)
    store_tied_lm_head(tmp_path)
    edit_tensors(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1})
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    # transformers loads the stored head, in spite of the config. Such a folder is ambiguous.
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        huggingface.open_language(tmp_path)


def test_files_that_are_not_configs_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        huggingface.open_vision(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        huggingface.open_vision(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        huggingface.open_language(tmp_path)


def test_all_problems_are_reported_together(tmp_path):
    oracle.llama(tmp_path)
    edit_config(tmp_path, intermediate_size=64, num_hidden_layers=2, tie_word_embeddings=False)
    with pytest.raises(UserError) as error:
        huggingface.load_language_folder(tmp_path)
    assert "model.layers.2.mlp.up_proj.weight is not part of this model" in str(error.value)
    assert "model.layers.{0,1}.mlp.gate_proj.weight has shape [48, 32], the config says [64, 32]" in str(error.value)
    assert "lm_head.weight is missing" in str(error.value)
