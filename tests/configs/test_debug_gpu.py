"""The train step of configs/debug_gpu.py lowers for CUDA on a machine without a GPU."""

import dataclasses

import jax
import pytest

from alignvlm_jax.config import load_config
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import example_batch
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.train_step import FIELDS, abstract_state, make_train_step
from tests.abstract_gpu import gpu_mesh


@dataclasses.dataclass
class _FakeGpu:
    compute_capability: str
    platform: str = "gpu"


@pytest.mark.parametrize("compute_capability, kernel", [("8.0", "flash"), ("7.5", "xla")])
def test_the_train_step_lowers_for_cuda(compute_capability, kernel):
    experiment, gpu = load_config("configs/debug_gpu.py"), _FakeGpu(compute_capability)
    model = dataclasses.replace(
        experiment.model,
        vision=hardware.resolve(experiment.model.vision, gpu),
        language=hardware.resolve(experiment.model.language, gpu),
    )
    assert model.language.attention == model.vision.attention == kernel
    stage, packing = experiment.stages[0], experiment.data.packing
    shapes = jax.eval_shape(
        lambda: example_batch(
            model, rows=packing.bins_per_microbatch, tiles=packing.tiles_per_bin, length=packing.tokens_per_bin
        )
    )
    batch = {name: jax.ShapeDtypeStruct((1, *shapes[name].shape), shapes[name].dtype) for name in FIELDS}
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = abstract_state(model, stage, mesh)
        with gpu_mesh(mesh):
            lowered = jax.jit(make_train_step(model, stage)).trace(state, batch).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert ("triton" in text) == (kernel == "flash")
    assert ("bf16" in text) == (kernel == "flash"), "GPUs before Ampere have no bfloat16"
