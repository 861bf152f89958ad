"""Shim: `data/file_kinds.py` under its name in an exported folder."""

from alignvlm_jax.data.file_kinds import identify

__all__ = ["identify"]
