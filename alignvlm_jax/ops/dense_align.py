"""ALIGN in its dense form, as the paper writes it: the reference for the streaming form.

    F' = softmax(LN_V(LN_D(f W1) W2ᵀ)) E_text                  arXiv 2502.01341, section 3

It holds every logit of every query, so it is meant for reading, for tests and for small inputs. The models use
`vocabulary_attention.py`, which computes the same result one block of words at a time. All steps run in the dtype of
the inputs; the tests use float64.

Axes: d encoder width, D decoder width, V vocabulary, Dv value width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dense_align(
    features: Float[Array, "... d"],
    *,
    w1: Float[Array, "d D"],
    w1_bias: Float[Array, " D"],
    hidden_scale: Float[Array, " D"],
    hidden_bias: Float[Array, " D"],
    w2: Float[Array, "V D"],
    vocab_scale: Float[Array, " V"],
    vocab_bias: Float[Array, " V"],
    text_embedding: Float[Array, "V D"],
    eps: float = 1e-5,
) -> Float[Array, "... D"]:
    """Returns the visual tokens F' of features f."""
    query = _layer_norm(features @ w1 + w1_bias, hidden_scale, hidden_bias, eps)
    return dense_vocabulary_attention(query, w2, vocab_scale, vocab_bias, text_embedding, eps)


def dense_vocabulary_attention(
    q: Float[Array, "... D"],
    keys: Float[Array, "V D"],
    scale: Float[Array, " V"],
    bias: Float[Array, " V"],
    values: Float[Array, "V Dv"],
    eps: float = 1e-5,
) -> Float[Array, "... Dv"]:
    """Returns softmax(LN_V(q keysᵀ)) values."""
    return dense_distribution(q, keys, scale, bias, eps) @ values


def dense_distribution(
    q: Float[Array, "... D"],
    keys: Float[Array, "V D"],
    scale: Float[Array, " V"],
    bias: Float[Array, " V"],
    eps: float = 1e-5,
) -> Float[Array, "... V"]:
    """Returns P = softmax(LN_V(q keysᵀ)), the distribution over words."""
    return jax.nn.softmax(_layer_norm(q @ keys.T, scale, bias, eps), axis=-1)


def _layer_norm(inputs, scale, bias, eps):
    centered = inputs - jnp.mean(inputs, axis=-1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + eps) * scale + bias
