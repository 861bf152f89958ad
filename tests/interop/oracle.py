"""Tiny SigLIP and Llama models of transformers with random weights, used as references."""

from pathlib import Path

import numpy as np
import torch
import transformers

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def relative_error(ours, theirs) -> float:
    """Returns the largest difference divided by the largest value."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Sets all weights to random values, also norms and biases, whose initial ones and zeros would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def siglip_config(**changes) -> transformers.SiglipVisionConfig:
    fields = dict(
        hidden_size=24, image_size=20, patch_size=6, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2
    )
    return transformers.SiglipVisionConfig(**{**fields, **changes})


def siglip(folder: Path | None = None, **changes) -> transformers.SiglipVisionModel:
    """Returns a vision model without a text tower; saves it if a folder is given."""
    model = randomize(transformers.SiglipVisionModel(siglip_config(**changes)))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def llama(folder: Path | None = None, save: dict | None = None, **changes) -> transformers.LlamaForCausalLM:
    """Returns a decoder; saves it if a folder is given, with the arguments `save` of `save_pretrained`."""
    fields = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters=dict(PLAIN),
        max_position_embeddings=64,
    )
    model = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes})))
    if folder is not None:
        model.save_pretrained(folder, **(save or {}))
    return model
