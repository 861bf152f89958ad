"""Shim: `data/samples.py` under its name in an exported folder."""

from alignvlm_jax.data.samples import to_bytes

__all__ = ["to_bytes"]
