"""Out-of-memory errors: the requested amount, a memory profile, and advice on what to change."""

import dataclasses
import gzip

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.training import out_of_memory
from tests.training.batches import MODEL

CONFIG = ExperimentConfig(model=MODEL, data=DataConfig(packing=PackingConfig(64, 3, 8)))


def allocate_too_much():
    # 32 TiB: no machine has that, so the allocation fails at once instead of swapping.
    jnp.zeros((2**45,), jnp.int8).block_until_ready()


def test_an_oversized_allocation_is_explained_and_memory_is_profiled(tmp_path):
    kept = jnp.ones((1000,))  # an array for the profile to list
    with pytest.raises(UserError) as caught, out_of_memory.explain_errors(CONFIG, tmp_path):
        allocate_too_much()
    message, profile = str(caught.value), tmp_path / out_of_memory.MEMORY_PROFILE
    assert message.startswith("out of memory: 32768.00 GiB were requested at once")
    assert str(profile) in message
    assert "fewer config.data.packing.bins_per_microbatch (now 8;" in message
    assert "config.model.language.remat=full" in message and "config.mesh.fsdp" in message
    assert b"buffer" in gzip.decompress(profile.read_bytes()), "a profile of the arrays in memory"
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    del kept


def test_a_profile_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    with pytest.raises(UserError, match="out of memory: .* no memory profile"):
        with out_of_memory.explain_errors(CONFIG, tmp_path / "missing"):
            allocate_too_much()


def test_other_errors_pass_through_unchanged(tmp_path):
    for error in (jax.errors.JaxRuntimeError("INTERNAL: broken"), KeyError("a")):
        with pytest.raises(type(error)), out_of_memory.explain_errors(CONFIG, tmp_path):
            raise error
    assert not list(tmp_path.iterdir())


def test_only_possible_changes_are_suggested():
    remat = dataclasses.replace(MODEL.language, remat="full")
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(MODEL, language=remat), data=DataConfig(packing=PackingConfig(64, 3, 1))
    )
    advice = out_of_memory.remedies(config)
    assert "bins_per_microbatch" not in advice and "language.remat" not in advice and "vision.remat" in advice


@pytest.mark.parametrize(
    ("message", "need"),
    [
        (  # Compiling for a TPU.
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.95G "
            "of 15.48G hbm. Exceeded hbm capacity by 6.47G.\n\nTotal hbm usage >= 22.47G:",
            "the program needs 21.95 GiB on each device, which has 15.48 GiB",
        ),
        (  # Running on a TPU.
            "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 3.95G at the bottom of memory. That was "
            "not possible. There are 1.92G free, 0B reserved, and 1.92G reservable.",
            "3.95 GiB were requested at once, more than is free on the device",
        ),
        (  # Running on a GPU.
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment",
            "4.44 GiB were requested at once, more than is free on the device",
        ),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
            "0.17 GiB were requested at once, more than is free on the device",
        ),
        ("RESOURCE_EXHAUSTED: no idea\nand more", "RESOURCE_EXHAUSTED: no idea"),
    ],
)
def test_the_needed_memory_is_parsed_from_each_backends_message(message, need):
    assert out_of_memory.needed_memory(message) == need
