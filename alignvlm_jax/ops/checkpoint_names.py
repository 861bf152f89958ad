"""Names of values that the backward pass can keep instead of recomputing them (`jax.ad_checkpoint.checkpoint_name`).

A name alone changes nothing. `models/rematerialization.py` makes the policies that keep the values.
"""

ATTENTION_OUT = "attention_out"
"""The result of attention and, with the kernels "splash", "tokamax" and "cpu", the statistics of each query's softmax.
With both, the backward pass does not run the forward kernel again."""

QKV = "qkv"
"""Queries, keys and values of attention, after the rotation by position."""

MLP_IN = "mlp_in"
"""The products before the nonlinearity of an MLP: "gate" and "up" of the decoder, "mlp_in" of the encoder."""
