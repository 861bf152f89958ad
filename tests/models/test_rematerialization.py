"""FLOPs of the gradient, and its values, under each rematerialization policy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from jax.interpreters import partial_eval
from jax.sharding import SingleDeviceSharding

from alignvlm_jax.models.language import LanguageModel
from alignvlm_jax.models.rematerialization import CANDIDATES
from alignvlm_jax.models.vision import VisionEncoder
from alignvlm_jax.parallel import hlo_work
from alignvlm_jax.parallel.hlo import Program
from alignvlm_jax.parallel.topology import has_compiler, topology_devices
from tests.tiny_models import tiny_language, tiny_vision

PARTS = ("decoder", "encoder")
LENGTH, LAYERS = 24, 2


def _model(part, remat, attention="xla"):
    """Returns the part, its inputs and the other arguments of its call."""
    fields = dict(num_layers=LAYERS, remat=remat, dtype="float32", attention=attention)
    if part == "encoder":
        return VisionEncoder(tiny_vision(**fields)), jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), {}
    arrays = {name: jnp.ones((1, LENGTH), jnp.int32) for name in ("positions", "segment_ids")}
    return LanguageModel(tiny_language(40, **fields)), jax.random.normal(jax.random.key(1), (1, LENGTH, 32)), arrays


def _summed(part, remat, attention="xla"):
    model, inputs, arrays = _model(part, remat, attention)

    def summed(params):
        output = model.apply(params, inputs, **arrays)
        return jnp.sum((output if part == "encoder" else output[0]) ** 3)

    return summed


def _init(part):
    model, inputs, arrays = _model(part, "none")
    return lambda: model.init(jax.random.key(0), inputs, **arrays)


def _gradient(part, remat, attention="xla"):
    """Returns the jaxpr of the gradient, without equations that no result depends on."""
    jaxpr = jax.make_jaxpr(jax.grad(_summed(part, remat, attention)))(jax.eval_shape(_init(part))).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _sum_over(jaxpr, measure):
    """Returns the sum of a measure of each equation in a jaxpr, each loop's times its iterations."""
    total = 0
    for equation in jaxpr.eqns:
        total += measure(equation)
        if equation.primitive.name != "pallas_call":
            inner = (getattr(sub, "jaxpr", sub) for sub in jaxprs_in_params(equation.params))
            total += equation.params.get("length", 1) * sum(_sum_over(sub, measure) for sub in inner)
    return total


def _product_flops(equation):
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


@pytest.mark.parametrize("part", PARTS)
def test_each_kept_value_saves_its_products(part):
    """The decoder's candidates of "auto" recompute more and more: each names one value less than the one before."""
    candidates = list(dict.fromkeys(candidate.language for candidate in CANDIDATES))
    flops = {remat: _sum_over(_gradient(part, remat), _product_flops) for remat in (*candidates, "dots")}
    none, dots_and_attention, *others = (flops[remat] for remat in candidates)
    # These two differ only in what lies between the products.
    assert none == dots_and_attention
    assert all(less < more for less, more in itertools.pairwise((dots_and_attention, *others)))
    # Two names save as much as each of them alone.
    assert flops["full"] - flops["dots"] == flops["attention_out"] - none > 0


@pytest.mark.parametrize(
    "part, remat, runs", [("decoder", "attention_out", 1), ("decoder", "full", 2), ("encoder", "attention_out", 1)]
)
def test_with_kept_attention_the_splash_kernel_runs_once(part, remat, runs):
    def is_forward(equation):
        return equation.primitive.name == "pallas_call" and "fwd" in str(equation.params["name"])

    assert _sum_over(_gradient(part, remat, attention="splash"), is_forward) == runs * LAYERS


@pytest.mark.large
@pytest.mark.skipif(not has_compiler(), reason="libtpu is only available for Linux on x86")
def test_a_compiled_tpu_program_runs_the_forward_kernel_once_with_kept_attention():
    device = topology_devices("v5e:2x2")[0]

    def forward_runs(remat):
        function, shapes = jax.grad(_summed("decoder", remat, attention="splash")), jax.eval_shape(_init("decoder"))
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device)), shapes
        )
        program = Program(jax.jit(function).lower(placed).compile().as_text())
        return sum(runs for name, runs in hlo_work.kernels(program).items() if "fwd" in name)

    assert forward_runs("full") == 2 * LAYERS
    assert forward_runs("attention_out") == LAYERS


@pytest.mark.parametrize("part", PARTS)
def test_values_and_gradients_are_the_same_under_all_policies(part):
    params = jax.jit(_init(part))()

    def evaluate(remat):
        value, gradient = jax.jit(jax.value_and_grad(_summed(part, remat)))(params)
        return value, ravel_pytree(gradient)[0]

    value, gradient = evaluate("none")
    for remat in ("full", "attention_out,qkv,mlp_in,dots"):
        ours = evaluate(remat)
        np.testing.assert_allclose(ours[0], value, rtol=1e-6)
        assert np.linalg.norm(ours[1] - gradient) <= 1e-6 * np.linalg.norm(gradient), remat


def test_lists_have_one_form():
    written = ("qkv,attention_out", " attention_out , qkv", ("qkv", "attention_out", "qkv"), ["attention_out", "qkv"])
    for remat in written:
        assert tiny_language(40, remat=remat).remat == tiny_vision(remat=remat).remat == "attention_out,qkv"
