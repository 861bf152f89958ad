"""Training and decoding have the same results in every mode that a program may turn on in JAX.

Sources: google/flax#924 (64-bit mode turns the optimizer's state into float64) and google/flax#1534 (a program that
raises at rank promotion cannot use a library that promotes).
"""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import numpy as np

from alignvlm_jax.inference.generate import Generator
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters
from alignvlm_jax.models.connectors import MLPConfig
from alignvlm_jax.training.train_step import create_state, make_train_step
from tests.inference import test_generate
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


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(jax.device_get(tree))


def assert_equal(actual, expected):
    """Fails unless two trees have the same arrays and dtypes."""
    assert len(leaves(actual)) == len(leaves(expected))
    for (path, left), (_, right) in zip(leaves(actual), leaves(expected), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))
        assert np.asarray(left).dtype == np.asarray(right).dtype, jax.tree_util.keystr(path)


def results(params):
    """Returns the state and the metrics after a step of training, and the answer of a model."""
    trained = jax.jit(make_train_step(MODEL, STAGE))(create_state(STAGE, params[0]), jax.device_put(BATCH))
    generator = Generator(test_generate.CONFIG, params[1], end_ids=(1,), pad_id=0)
    return trained, generator.generate(test_generate.PROMPTS[:1], max_new_tokens=3)


def test_training_and_decoding_have_the_same_results_in_all_modes_at_once():
    params = [
        nn.unbox(jax.jit(lambda rng, config=config: random_parameters(config, rng))(jax.random.key(0)))
        for config in (MODEL, test_generate.CONFIG)
    ]
    expected = results(params)
    with all_modes():
        actual = results(params)
    assert_equal(actual, expected)


def test_the_model_and_its_gradient_can_be_part_of_a_program_that_uses_a_mode():
    def loss(params, batch):
        return AlignVLM(MODEL).apply({"params": params}, batch, method="loss").loss

    boxed = jax.eval_shape(lambda: random_parameters(MODEL, jax.random.key(0)))
    batch = jax.tree.map(lambda field: field[0], BATCH)
    with all_modes():
        gradient = jax.eval_shape(jax.grad(loss), nn.unbox(boxed), batch)
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
