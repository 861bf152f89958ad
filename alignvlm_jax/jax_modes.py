"""Runs the library in JAX's default modes, whatever modes the process has turned on.

A program may turn on modes for its own computations, by a variable or in code:

    JAX_ENABLE_X64=1                    jax.config.update("jax_enable_x64", True)
    JAX_NUMPY_RANK_PROMOTION=raise      with jax.numpy_rank_promotion("raise"): ...
    JAX_NUMPY_DTYPE_PROMOTION=strict    with jax.numpy_dtype_promotion("strict"): ...
    JAX_TRANSFER_GUARD=disallow         with jax.transfer_guard("disallow"): ...

The first would double the width of numbers that have no explicit dtype. The others raise errors at operations that
Flax, Optax and this library use on purpose. The functions that programs call are therefore decorated with
`ordinary_modes`. Their results are those of the default modes, bit for bit, and nothing changes for the code around
them. Modes that only report (`warn`, `log`) and those that search for errors (JAX_DEBUG_NANS) stay as they are.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

_VARIABLES = (
    "JAX_ENABLE_X64",
    "JAX_NUMPY_RANK_PROMOTION",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_TRANSFER_GUARD",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST",
)


@contextlib.contextmanager
def ordinary_modes() -> Iterator[None]:
    """Turns the modes off that change results or forbid operations: as a context, or as a decorator.

    Modes belong to a thread. A thread that is started inside the context has those of the process.
    """
    # `alignvlm --help` must not wait for jax.
    if "jax" not in sys.modules and not any(name in os.environ for name in _VARIABLES):
        yield
        return
    import jax

    # Only modes that are on: a mode that is set again, even to the same value, makes JAX compile functions again.
    with contextlib.ExitStack() as stack:
        if jax.config.jax_enable_x64:
            stack.enter_context(jax.enable_x64(False))
        if jax.config.jax_numpy_rank_promotion == "raise":
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        if jax.config.jax_numpy_dtype_promotion == "strict":
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
        for direction in ("host_to_device", "device_to_device", "device_to_host"):
            guard = getattr(jax.config, f"jax_transfer_guard_{direction}")
            if (guard or "").startswith("disallow"):
                stack.enter_context(getattr(jax, f"transfer_guard_{direction}")("allow"))
        yield
