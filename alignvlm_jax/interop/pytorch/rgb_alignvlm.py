"""Shim: `data/rgb.py` under its name in an exported folder."""

from alignvlm_jax.data.rgb import open_encoded, to_rgb

__all__ = ["open_encoded", "to_rgb"]
