"""FLOPs of the gradient, and its values, under each rematerialization policy."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from alignvlm_jax.models.language import LanguageModel
from alignvlm_jax.models.vision import VisionEncoder
from tests.tiny_models import tiny_language, tiny_vision

LENGTH = 24


def _decoder(remat):
    """Returns a function of the decoder's parameters and inputs, and shapes of its arguments."""
    model = LanguageModel(tiny_language(40, remat=remat, dtype="float32", attention="xla"))
    inputs = jax.ShapeDtypeStruct((1, LENGTH, 32), jnp.float32)
    arrays = {name: jnp.ones((1, LENGTH), jnp.int32) for name in ("positions", "segment_ids")}
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **arrays), inputs)
    return lambda params, inputs: jnp.sum(model.apply(params, inputs, **arrays)[0] ** 2), params, inputs


def _encoder(remat):
    """Returns a function of the encoder's parameters and inputs, and shapes of its arguments."""
    model = VisionEncoder(tiny_vision(num_layers=2, remat=remat, dtype="float32", attention="xla"))
    inputs = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), inputs)
    return lambda params, inputs: jnp.sum(model.apply(params, inputs) ** 2), params, inputs


PARTS = {"decoder": _decoder, "encoder": _encoder}


def product_flops(jaxpr):
    """Returns the floating-point operations of all matrix products in a jaxpr, each loop's times its iterations."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        inner = sum(product_flops(getattr(sub, "jaxpr", sub)) for sub in jaxprs_in_params(equation.params))
        total += equation.params.get("length", 1) * inner
    return total


def gradient_flops(part, remat):
    function, params, inputs = PARTS[part](remat)
    return product_flops(jax.make_jaxpr(jax.grad(function))(params, inputs).jaxpr)


@pytest.mark.parametrize("part", PARTS)
def test_policies_differ_in_the_flops_of_the_gradient(part):
    flops = [gradient_flops(part, remat) for remat in ("none", "dots", "full")]
    assert flops[0] < flops[1] < flops[2]
