"""Settings of tiny models that tests of several packages share."""

from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig


def tiny_language(vocab_size: int, **changes) -> LanguageConfig:
    """Returns a decoder of two layers with grouped queries, except for the changes."""
    fields = dict(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
    return LanguageConfig(vocab_size=vocab_size, **{**fields, **changes})


def tiny_vision(image_size: int = 16, **changes) -> VisionConfig:
    """Returns an encoder of one layer, except for the changes."""
    fields = dict(patch_size=8, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2)
    return VisionConfig(image_size=image_size, **{**fields, **changes})
