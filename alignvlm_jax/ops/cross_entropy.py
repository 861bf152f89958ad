"""The language-model loss, as a sum and its weight, so that pieces of a batch can be added before the one division.

Axes: B rows, L positions, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def weighted_cross_entropy(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], weights: Float[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (sum over positions of weight * -log p(target), sum of the weights), both float32."""
    logits = logits.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    negative_log_likelihood = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(weights * negative_log_likelihood), jnp.sum(weights)
