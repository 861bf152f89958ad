"""Dense reference of the loss, and helpers to compare with references in float64.

The dense reference of ALIGN is part of the package: `alignvlm_jax/ops/dense_align.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np


def entropy(probabilities):
    return -jnp.sum(probabilities * jnp.log(probabilities), axis=-1)


def linear_cross_entropy(hidden, head, targets, weights, z_loss=0.0):
    """Returns the sum of weight * (-log p(target) + z_loss * log(Z)²)."""
    logits = hidden @ head.T
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (log_z - target_logits + z_loss * log_z**2))


def in_float64(function, *inputs):
    """Returns `function(*inputs)` as numpy arrays, with all floating-point inputs and steps in float64."""
    with jax.enable_x64(True):
        wide = [np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in inputs]
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def distance(got, expected) -> float:
    """Returns the norm of the difference, relative to the norm of the expected array."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))
