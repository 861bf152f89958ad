"""Gradients that devices exchange in bfloat16: the programs, and their values against those of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alignvlm_jax.ops import VocabularyMesh, linear_cross_entropy
from alignvlm_jax.ops.embedding_lookup import embedding_lookup
from alignvlm_jax.ops.gradient_dtype import exchange_gradients_in
from alignvlm_jax.ops.linear import linear
from alignvlm_jax.parallel.hlo import Program, array_bytes
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.topology import has_compiler, topology_devices
from tests.ops import dense

AXES = VocabularyMesh(queries=("data", "fsdp"), vocabulary=("tensor",), widths=("fsdp",))
ROWS, LENGTH, WIDTH, WORDS = 8, 96, 256, 1024
SPECS = dict(embedding=jax.P("tensor", "fsdp"), up=jax.P("fsdp", "tensor"), down=jax.P("tensor", "fsdp"))
SHAPES = dict(embedding=(WORDS, WIDTH), up=(WIDTH, 2 * WIDTH), down=(2 * WIDTH, WIDTH))


def loss(params, tokens):
    """A model with all kinds of matrices: an embedding that is also the head, and linear layers."""
    hidden = embedding_lookup(params["embedding"], tokens, dtype="bfloat16", mesh_axes=AXES)
    hidden += linear(jax.nn.relu(linear(hidden, params["up"])), params["down"])
    weights = jnp.ones(tokens.shape)
    return linear_cross_entropy(hidden, params["embedding"], tokens, weights, mesh_axes=AXES)[0]


def lower(config, dtype, devices=None):
    """Returns the gradient lowered for a mesh, and the shardings of its arguments."""
    mesh = make_mesh(config, devices)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    rows = NamedSharding(mesh, jax.P(("data", "fsdp")))
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def gradient(params, tokens):
        with exchange_gradients_in(dtype):
            return jax.grad(loss)(params, tokens)

    with jax.set_mesh(mesh):
        jitted = jax.jit(gradient, in_shardings=(shardings, rows), out_shardings=shardings)
        return jitted.lower(params, tokens), (shardings, rows)


def test_gradients_are_float32_again_and_rounded_once():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape) / 16, jnp.float32) for name, shape in SHAPES.items()}
    tokens = jnp.asarray(rng.integers(0, WORDS, (ROWS, LENGTH)))
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        lowered, shardings = lower(MeshConfig(data=2, fsdp=2, tensor=2), dtype)
        gradients[dtype] = lowered.compile()(*jax.device_put((params, tokens), shardings))
        types = [f"tensor<{WIDTH}x{2 * WIDTH}x{short}>" for short in ("f32", "bf16")]
        products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        assert any(line.endswith(types[dtype == "bfloat16"]) for line in products), "the gradient of `up`"
    for name, got in gradients["bfloat16"].items():
        assert got.dtype == jnp.float32
        # The largest error of one rounding is 2^-8 of a number; four devices may round their sum again.
        assert 0 < dense.distance(got, gradients["float32"][name]) < 2**-7


@pytest.fixture
def little_effort():
    """Makes the TPU compiler optimize less, which takes less time."""
    usual = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1")
    yield
    jax.config.update("jax_optimization_level", usual)


@pytest.mark.usefixtures("little_effort")
@pytest.mark.skipif(not has_compiler(), reason="libtpu is only available for Linux on x86")
@pytest.mark.parametrize("config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)])
def test_tpus_exchange_all_gradients_of_matrices_in_the_dtype(config):
    num_bytes = {}
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        lowered, _ = lower(config, dtype, topology_devices("v5e:2x4"))
        program = Program(lowered.compile().as_text())
        found = [
            shape
            for name in program.runs
            for instruction in program.computations.get(name, {}).values()
            if instruction.opcode.removesuffix("-start") in ("all-reduce", "reduce-scatter")
            for shape in instruction.shapes
        ]
        # Sums of activations and of the softmax have an axis of positions: of one row, or of a device.
        positions = {LENGTH, ROWS * LENGTH // 8, ROWS * LENGTH // 4}
        found = [(kind, shape) for kind, shape in found if not positions & set(shape) and len(shape) > 1]
        assert {kind for kind, _ in found} == {short}
        num_bytes[dtype] = sum(array_bytes(*shape) for shape in found)
    if config.data == 8:  # the other program exchanges reduced parts or complete ones, as XLA sees fit
        assert num_bytes["bfloat16"] * 2 == num_bytes["float32"]
