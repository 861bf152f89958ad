"""One experiment per file, installed as `alignvlm_jax.configs`: `--config configs/nano.py` works outside the clone too."""
