"""Config files, one experiment per file. They are installed as `alignvlm_jax.configs`, to be usable outside a clone."""
