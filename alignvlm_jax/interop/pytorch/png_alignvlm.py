"""Shim: `data/png.py` under its name in an exported folder."""

from alignvlm_jax.data.png import without_metadata

__all__ = ["without_metadata"]
