"""Shim: `data/tiff.py` under its name in an exported folder."""

from alignvlm_jax.data.tiff import read_page

__all__ = ["read_page"]
