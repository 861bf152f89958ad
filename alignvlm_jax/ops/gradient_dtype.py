"""The dtype in which devices exchange gradients of weights while they sum them.

    with exchange_gradients_in("bfloat16"):
        jax.grad(loss)(params)

A weight's gradient is a sum over rows on every device, and then over devices. The first sum is always float32. By
default, so is the second. In bfloat16, every device rounds its sum once, and half as many bytes travel. Results are
float32 again, so microbatches are added in float32, and the optimizer sees float32.

The setting affects matrices: kernels of linear layers that compute in bfloat16, and tables over the vocabulary. Norms
and biases are small, and always exchanged in float32. So are the kernels of layers that compute in float32.
"""

import contextlib
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

GRADIENT_DTYPES = ("float32", "bfloat16")

# Part of the key under which `jax.jit` caches programs.
_CONTEXT = jax.make_user_context("float32")


def exchange_gradients_in(dtype: str) -> contextlib.AbstractContextManager:
    """Returns a context manager in which gradients are traced so that devices exchange them in `dtype`."""
    return _CONTEXT(dtype)


def exchanged_dtype() -> str:
    """Returns the dtype of the innermost `exchange_gradients_in`, float32 outside of all."""
    return _CONTEXT.value


def exchange(
    collective: Callable[[Float[Array, "..."]], Float[Array, "..."]], gradient: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns `collective(gradient)` in the dtype of `gradient`, computed from values in the exchanged dtype."""
    return collective(gradient.astype(exchanged_dtype())).astype(gradient.dtype)
