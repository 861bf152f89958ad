"""One experiment per file. Installed as `alignvlm_jax.configs`, so `--config configs/nano.py` works outside the clone too."""
