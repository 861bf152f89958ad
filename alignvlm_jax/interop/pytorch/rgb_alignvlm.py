"""`data/rgb.py` under the name it has in an exported folder."""

from alignvlm_jax.data.rgb import to_rgb

__all__ = ["to_rgb"]
