"""The geometry of well-known backbones, as their publishers state it in `config.json`.

It stands in for folders that are not on this machine: a program can be compiled, or a config checked, without them.

    find("language", "meta-llama/Llama-3.1-8B-Instruct")    # the same for ~/models/Llama-3.1-8B
"""

import dataclasses

from alignvlm_jax.models.language import LanguageConfig, RopeScaling
from alignvlm_jax.models.vision import VisionConfig

_SO400M = VisionConfig(
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=27,
    num_heads=16,
    layer_norm_eps=1e-6,
)
_LLAMA_1B = LanguageConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=131072,
)
_LLAMA_8B = dataclasses.replace(
    _LLAMA_1B,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    head_dim=128,
    rope_scaling=dataclasses.replace(_LLAMA_1B.rope_scaling, factor=8.0),
    tie_word_embeddings=False,
)
_SMOLLM2_135M = LanguageConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)
_PUBLISHERS = ("google", "meta-llama", "huggingfacetb")
_GEOMETRY = {
    "vision": {
        "siglip-so400m-patch14-384": _SO400M,
        "siglip2-so400m-patch14-384": _SO400M,
        "siglip-base-patch16-224": dataclasses.replace(
            _SO400M,
            image_size=224,
            patch_size=16,
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_heads=12,
        ),
    },
    "language": {
        "llama-3.2-1b": _LLAMA_1B,
        "llama-3.2-3b": dataclasses.replace(_LLAMA_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128),
        "llama-3.1-8b": _LLAMA_8B,
        "smollm2-135m": _SMOLLM2_135M,
    },
}


def find(part: str, name: str) -> VisionConfig | LanguageConfig | None:
    """Returns the published geometry of a backbone, or None if it is not in the table.

    Args:
      part: "vision" or "language".
      name: name of the model, of its folder, or its id on the Hub (ORG/NAME, with or without @REVISION). The same model
        of another organization may have another geometry, so it is not in the table.
    """
    parent, _, model = name.lower().removeprefix("hf://").partition("@")[0].rpartition("/")
    is_hub_id = bool(parent) and "/" not in parent and not parent.startswith((".", "~"))
    if is_hub_id and parent not in _PUBLISHERS:
        return None
    return _GEOMETRY[part].get(model.removesuffix("-instruct"))


def names(part: str) -> list[str]:
    """Returns the names of the encoders ("vision") or decoders ("language") in the table."""
    return sorted(_GEOMETRY[part])
