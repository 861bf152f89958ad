"""Values and gradients of the linear layer against float64, and the dtype in which devices sum gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alignvlm_jax.ops.linear import linear
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh


def _inputs(dtype):
    """Returns inputs, kernel, bias and a cotangent; the parameters are float32, as in training."""
    rng = np.random.default_rng(0)
    inputs, cotangent = rng.normal(size=(8, 16, 12)), rng.normal(size=(8, 16, 20)) + 1
    kernel, bias = rng.normal(size=(12, 20)), rng.normal(size=20)
    return (
        jnp.asarray(inputs, dtype),
        jnp.asarray(kernel, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        jnp.asarray(cotangent, dtype),
    )


def _with_gradients(inputs, kernel, bias, cotangent):
    value, pull_back = jax.vjp(linear, inputs, kernel, bias)
    return value, *pull_back(cotangent)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_values_and_gradients_match_float64(dtype, tolerance):
    arrays = _inputs(dtype)
    x, kernel, bias, dy = (np.asarray(array, np.float64) for array in arrays)
    # The layer casts the kernel to the dtype of its inputs.
    rounded = np.asarray(arrays[1].astype(dtype), np.float64)
    expected = (
        x @ rounded + bias,
        dy @ rounded.T,
        np.einsum("bti,bto->io", x, dy),
        dy.sum((0, 1)),
    )
    got = _with_gradients(*arrays)
    assert [str(array.dtype) for array in got] == [dtype, dtype, "float32", "float32"]
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        # Gradients of kernel and bias are sums over rows: they have float32 precision for any dtype of the inputs.
        limit = tolerance if index < 2 else 1e-6
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= limit * np.linalg.norm(b)


def test_gradients_are_summed_over_devices_in_float32():
    mesh = make_mesh(MeshConfig(data=8))
    split, replicated = NamedSharding(mesh, jax.P("data")), NamedSharding(mesh, jax.P())
    inputs, kernel, bias, cotangent = _inputs("bfloat16")
    compiled = jax.jit(
        _with_gradients,
        in_shardings=(split, replicated, replicated, split),
        out_shardings=(split, split, replicated, replicated),
    )
    text = compiled.lower(inputs, kernel, bias, cotangent).compile().as_text()
    reduced = [line for line in text.splitlines() if " all-reduce(" in line]
    assert reduced and all("bf16" not in line.split(" all-reduce(")[0] for line in reduced)
