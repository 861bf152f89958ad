"""Linear layer whose products run in the compute dtype and whose weight gradients are summed in float32.

Axes: T rows (positions of all bins), i input width, o output width.

In plain JAX, the gradient of `x @ kernel.astype(bfloat16)` is bfloat16, and so is its sum over rows and, on a mesh,
over devices. Here, the product that computes the gradient returns float32, and devices exchange float32. On request
(`gradient_dtype.py`), the sum over rows is rounded once, and devices exchange bfloat16.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops.gradient_dtype import exchanged_dtype


@ordinary_modes()
def linear(
    inputs: Float[Array, "... i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "... o"]:
    """Returns `inputs @ kernel + bias` in the dtype of `inputs`; the gradients of kernel and bias are float32."""
    # On a CPU, the gradient of one product of all rows takes half as long as the gradient of a batched product.
    rows = inputs.reshape(-1, inputs.shape[-1])
    outputs = _product(rows, kernel)
    if bias is not None:
        # Add in the bias's float32, so that the gradient of the bias is summed in float32, too. XLA fuses the addition
        # into the product.
        outputs = (outputs + bias).astype(inputs.dtype)
    return outputs.reshape(*inputs.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _product(rows: Float[Array, "T i"], kernel: Float[Array, "i o"]) -> Float[Array, "T o"]:
    return jnp.dot(rows, kernel.astype(rows.dtype))


@ordinary_modes()
def _product_forward(rows, kernel):
    # The product itself, not `_product`: a rematerialization policy does not see inside of a custom VJP.
    return jnp.dot(rows, kernel.astype(rows.dtype)), (rows, kernel)


@ordinary_modes()
def _product_backward(residuals, cotangent):
    rows, kernel = residuals
    drows = jnp.dot(cotangent, kernel.T.astype(rows.dtype))
    # XLA sums the result of this product over devices, in its dtype. Accelerators accumulate a product in float32 even
    # if its result is bfloat16. A product of float32 cannot have a narrower result.
    dtype = jnp.promote_types(exchanged_dtype(), rows.dtype)
    dkernel = jnp.dot(rows.T, cotangent, preferred_element_type=dtype)
    return drows, dkernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)
