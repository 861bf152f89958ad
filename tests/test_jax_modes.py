"""Training and decoding have the same results in every mode that a program may turn on in JAX.

Sources: google/flax#924 (64-bit mode turns the optimizer's state into float64) and google/flax#1534 (a program that
raises at rank promotion cannot use a library that promotes).
"""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from alignvlm_jax.inference.generate import Generator
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters
from alignvlm_jax.models.connectors import MLPConfig
from alignvlm_jax.training.train_step import create_state, make_train_step
from tests.inference.test_generate import PROMPTS
from tests.training.batches import MODEL, random_batch, stage

BATCH = random_batch(3, bins=2)
STAGE = stage()


@contextlib.contextmanager
def all_modes():
    """Turns on every mode that changes results or forbids operations."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.transfer_guard("disallow"),
    ):
        yield


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))())


def test_answers_are_the_same_in_all_modes_at_once(params):
    def answer():
        return Generator(MODEL, params, end_ids=(1,), pad_id=0).generate(PROMPTS[:1], max_new_tokens=3)[0]

    expected = answer()
    with all_modes():
        actual = answer()
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == expected.dtype


def test_training_has_the_same_dtypes_in_all_modes_at_once(params):
    def train():
        state = create_state(STAGE, params)
        return state, jax.eval_shape(make_train_step(MODEL, STAGE), state, BATCH)

    expected = train()
    with all_modes():
        actual = train()
    jax.tree.map(np.testing.assert_array_equal, actual[0], expected[0])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), actual) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )


def test_a_gradient_of_the_model_can_be_part_of_a_program_that_uses_a_mode(params):
    def loss(params, batch):
        return AlignVLM(MODEL).apply({"params": params}, batch, method="loss").loss

    with all_modes():
        gradient = jax.eval_shape(jax.grad(loss), params, jax.tree.map(lambda field: field[0], BATCH))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_a_mode_is_on_again_after_the_block_and_reports_are_not_silenced():
    with all_modes(), jax.transfer_guard_device_to_host("log"):
        with ordinary_modes():
            assert not jax.config.jax_enable_x64 and jax.config.jax_transfer_guard_host_to_device == "allow"
            assert jax.config.jax_transfer_guard_device_to_host == "log"
        assert jax.config.jax_enable_x64 and jax.config.jax_transfer_guard_host_to_device == "disallow"


def test_a_connector_without_words_has_no_metric_of_words():
    """A NaN in its place would stop a run with JAX_DEBUG_NANS."""
    model = dataclasses.replace(MODEL, connector=MLPConfig())
    params = nn.unbox(jax.eval_shape(lambda: random_parameters(model, jax.random.key(0))))
    state = jax.eval_shape(lambda params: create_state(STAGE, params), params)
    _, metrics = jax.eval_shape(make_train_step(model, STAGE), state, BATCH)
    assert "loss" in metrics and "effective_tokens" not in metrics
