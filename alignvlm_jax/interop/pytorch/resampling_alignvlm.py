"""Shim: `data/resampling.py` under its name in an exported folder."""

from alignvlm_jax.data.resampling import num_visual_tokens, resample_images

__all__ = ["num_visual_tokens", "resample_images"]
