"""Shares compiled steps between the runs of a test file."""

import functools

import pytest

from alignvlm_jax.training import trainer


@pytest.fixture(scope="module", autouse=True)
def shared_train_steps():
    """Gives runs with the same model, stage and mesh one jitted step, so that JAX traces it once per file.

    Processes that tests start trace their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "jit_train_step", functools.cache(trainer.jit_train_step))
        yield
