"""Attention and the train step compiled by XLA's CUDA compiler at the shapes of the 1B model, with their memory.

`make test-cuda` installs the compiler into build/cuda-compiler and runs this file. No GPU is needed.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from alignvlm_jax.config import load_config
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import example_batch
from alignvlm_jax.ops import attention
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.cuda_topology import gpu_devices
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training.ahead_of_time import compilable_stage, resolve
from alignvlm_jax.training.train_step import abstract_state, batch_fields, jit_train_step

PACKAGES = Path(os.environ.get("CUDA_COMPILER", Path(__file__).parents[2] / "build/cuda-compiler"))
LENGTH, HEADS, KV_HEADS, WIDTH = 14_848, 32, 8, 64  # a bin of the 1B model
GB = 1e9

needs_compiler = pytest.mark.skipif(not PACKAGES.exists(), reason="`make test-cuda` installs the CUDA compiler")


def test_a_missing_compiler_is_reported_with_the_command_to_install_it(tmp_path):
    with pytest.raises(UserError, match="make test-cuda"):
        gpu_devices("h100", tmp_path)


def test_an_unknown_gpu_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="a100, h100"):
        gpu_devices("h300", tmp_path)


@needs_compiler
@pytest.mark.large
@pytest.mark.parametrize(
    "gpu, kernel, largest",
    [("h100", "tokamax", 0.25), ("h100", "flash", 0.3), ("a100", "flash", 0.3), ("h100", "xla", 4), ("a100", "xla", 4)],
)
def test_each_choice_of_attention_compiles_and_needs_little_memory(gpu, kernel, largest):
    if kernel == "tokamax":
        pytest.importorskip("tokamax")
    device = gpu_devices(gpu, PACKAGES)[0]
    query = jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, LENGTH, KV_HEADS, WIDTH), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def step(query, key, value, segment_ids, cotangent):
        attend = functools.partial(attention.packed_attention, segment_ids=segment_ids, causal=True, kernel=kernel)
        attended, pull_back = jax.vjp(attend, query, key, value)
        return attended, pull_back(cotangent)

    on_gpu = SingleDeviceSharding(device)
    compiled = (
        jax.jit(step, in_shardings=on_gpu, out_shardings=on_gpu).lower(query, key, key, segments, query).compile()
    )
    memory = compiled.memory_analysis()
    print(f"\n{gpu}, {kernel}: {memory.temp_size_in_bytes / GB:.2f} GB besides inputs and results")
    assert memory.temp_size_in_bytes < largest * GB


@needs_compiler
@pytest.mark.large
def test_the_train_step_of_1b_fits_on_one_h100():
    pytest.importorskip("tokamax")
    experiment = load_config("configs/alignvlm_1b.py", ["model.language.remat=full", "model.vision.remat=full"])
    devices = gpu_devices("h100", PACKAGES)
    mesh, model, stage = (
        make_mesh(experiment.mesh, devices),
        resolve(experiment.model, devices[0]),
        compilable_stage(experiment, 0),
    )
    assert model.language.attention == model.vision.attention == "tokamax"
    packing = experiment.data.packing
    shapes = jax.eval_shape(lambda: example_batch(model, rows=1, tiles=packing.tiles_per_bin, length=LENGTH))
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH_SPEC)
    batch = {
        name: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype, sharding=rows)
        for name, leaf in shapes.items()
        if name in batch_fields(model)
    }
    with jax.set_mesh(mesh):
        state = abstract_state(model, stage, mesh)
        compiled = jit_train_step(model, stage, mesh).lower(state, batch).compile()
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    temporary = memory.temp_size_in_bytes / GB
    print(f"\n1B, stage 1: {total / GB:.1f} GB, {temporary:.1f} of them besides weights and optimizer")
    assert total < 80 * GB
