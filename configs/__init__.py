"""One experiment per file, installed as `alignvlm_jax.configs`, so that they can be named outside the clone too."""
