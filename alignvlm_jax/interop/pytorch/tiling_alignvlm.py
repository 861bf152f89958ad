"""Shim: `data/tiling.py` under its name in an exported folder."""

from alignvlm_jax.data.tiling import TilePlan, TilingConfig, cut_tiles, plan_tiles

__all__ = ["TilePlan", "TilingConfig", "cut_tiles", "plan_tiles"]
