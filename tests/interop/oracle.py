"""Tiny SigLIPs and Llamas of transformers with random weights: what they compute is the oracle."""

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
    """The largest difference, as a fraction of the largest value."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases too: transformers starts those at one and zero, which hides mistakes."""
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
    """The vision model alone; saved if a folder is given."""
    model = scatter(transformers.SiglipVisionModel(siglip_config(**changes)))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def llama(folder: Path | None = None, save: dict | None = None, **changes) -> transformers.LlamaForCausalLM:
    """A decoder; saved if a folder is given, with the arguments `save`."""
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
    model = scatter(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes})))
    if folder is not None:
        model.save_pretrained(folder, **(save or {}))
    return model
