"""Shim: `data/rgb.py` under its name in an exported folder."""

from alignvlm_jax.data.rgb import formats, to_rgb

__all__ = ["formats", "to_rgb"]
