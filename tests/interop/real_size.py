"""Writes the backbones of the paper's 1B model as Hugging Face folders with random weights, one shard at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import transformers

from alignvlm_jax.backbones import backbone_folder

SO400M = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
LLAMA_1B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
    max_position_embeddings=131072,
)
SO400M_PARAMETERS = 412_987_248  # without the pooling head
_SHARD_BYTES = 600_000_000


def write_vision(folder: Path) -> None:
    """Writes SigLIP So400m/14 at 384 px, including its pooling head."""
    config = transformers.SiglipVisionConfig(**SO400M)
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(config)
    _write(folder, SO400M, model.state_dict())


def write_language(folder: Path) -> None:
    """Writes Llama-3.2-1B with the nano tokenizer, whose ids are the first 512 of the vocabulary."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_1B))
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    _write(folder, LLAMA_1B, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((backbone_folder("language", "nano") / name).read_bytes())


def _write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Writes the config and random bfloat16 tensors of the given shapes, with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, keys in enumerate(_shards(tensors)):
        name = f"model-{number:05d}.safetensors"
        shard = {key: _random(rng, key, tuple(tensors[key].shape)) for key in keys}
        safetensors.numpy.save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yields the keys of each shard, in order."""
    keys, size = [], 0
    for key, tensor in tensors.items():
        if keys and size + 2 * tensor.numel() > _SHARD_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += 2 * tensor.numel()
    yield keys


def _random(rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns weights of the magnitude of trained ones, with the scales of norms near 1."""
    values = rng.standard_normal(shape, np.float32)
    values *= 0.02
    if len(shape) == 1 and "norm" in key and key.endswith("weight"):
        values += 1
    return values.astype(ml_dtypes.bfloat16)
