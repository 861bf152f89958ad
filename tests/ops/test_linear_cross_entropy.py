"""The loss against torch and against the dense form in float64: value, gradients, chunks of weighted positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from alignvlm_jax.ops import linear_cross_entropy
from tests.ops import dense

TOLERANCE = 5e-6
WIDTH, WORDS = 16, 53


def inputs(shape=(3, 40), answered=0.3, dtype=jnp.float32):
    """Hidden states, head, targets and weights that differ, most of them 0."""
    rng = np.random.default_rng(0)
    weights = rng.random(shape) * 2 * (rng.random(shape) < answered)
    hidden, head = rng.normal(size=(*shape, WIDTH)), rng.normal(size=(WORDS, WIDTH))
    targets = rng.integers(0, WORDS, shape)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)


def assert_is_dense(arguments, z_loss, **options):
    hidden, head, targets, weights = arguments

    def ours(hidden, head):
        loss, weight = linear_cross_entropy(hidden, head, targets, weights, z_loss=z_loss, **options)
        return 3 * loss, weight

    (loss, weight), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    wanted, wanted_gradients = dense.in_float64(
        jax.value_and_grad(lambda *a: 3 * dense.linear_cross_entropy(*a, z_loss=z_loss), (0, 1)), *arguments
    )
    np.testing.assert_allclose(loss, wanted, rtol=TOLERANCE)
    np.testing.assert_allclose(weight, np.sum(weights), rtol=1e-6)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert dense.distance(got, want) <= TOLERANCE
    unanswered = np.asarray(gradients[0])[np.asarray(weights) == 0]
    assert np.all(unanswered == 0)


# About 36 of 120 positions count: one chunk too large, one of almost as many, several, one a position.
@pytest.mark.parametrize(
    ("chunk_size", "block_size", "z_loss"), [(None, None, 0.0), (40, 20, 0.0), (17, 53, 0.1), (1, 52, 0.1)]
)
def test_value_and_gradients(chunk_size, block_size, z_loss):
    assert_is_dense(inputs(), z_loss, chunk_size=chunk_size, block_size=block_size)


@pytest.mark.parametrize("answered", [1.0, 0.008])
def test_all_positions_count_and_hardly_any(answered):
    arguments = inputs(answered=answered)
    assert np.count_nonzero(arguments[3]) in (1, 120)
    assert_is_dense(arguments, 0.0, chunk_size=16)


def test_no_position_counts():
    hidden, head, targets, weights = inputs()
    ours = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1), has_aux=True))
    (loss, weight), gradients = ours(hidden, head, targets, weights * 0)
    assert loss == 0 and weight == 0
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


def test_value_and_gradient_are_those_of_torch():
    hidden, head, targets, weights = inputs()
    theirs = [torch.tensor(np.asarray(leaf), dtype=torch.float64, requires_grad=True) for leaf in (hidden, head)]
    logits = (theirs[0] @ theirs[1].T).reshape(-1, WORDS)
    flat_targets = torch.tensor(np.asarray(targets, np.int64)).flatten()
    losses = torch.nn.functional.cross_entropy(logits, flat_targets, reduction="none")
    (losses * torch.tensor(np.asarray(weights), dtype=torch.float64).flatten()).sum().backward()
    ours = jax.jit(jax.grad(lambda *a: linear_cross_entropy(*a, targets, weights)[0], (0, 1)))
    for got, want in zip(ours(hidden, head), theirs, strict=True):
        assert dense.distance(got, want.grad.numpy()) <= TOLERANCE


def test_bfloat16_is_no_worse_than_the_dense_form_in_bfloat16():
    hidden, head, targets, weights = inputs(dtype=jnp.bfloat16)

    def all_logits(hidden, head):
        """Logits rounded to bfloat16, and so their gradient: what a bfloat16 program keeps."""
        logits = (hidden @ head.T).astype(jnp.float32)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - right))

    value, wanted = dense.in_float64(
        jax.value_and_grad(dense.linear_cross_entropy, (0, 1)), hidden, head, targets, weights
    )
    ours = jax.jit(jax.value_and_grad(lambda *a: linear_cross_entropy(*a, targets, weights)[0], (0, 1)))
    loss, gradients = ours(hidden, head)
    theirs = jax.jit(jax.grad(all_logits, (0, 1)))(hidden, head)
    np.testing.assert_allclose(loss, value, rtol=1e-3)
    for got, same, want in zip(gradients, theirs, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        assert dense.distance(got, want) <= 1.1 * dense.distance(same, want)


def test_there_are_as_many_chunks_as_weighted_positions_need():
    """The loop over chunks ends with them: counted by the program, not by its shape."""
    hidden, head, targets, weights = inputs()
    text = jax.jit(linear_cross_entropy, static_argnames="chunk_size").lower(
        hidden, head, targets, weights, chunk_size=8
    ).as_text()
    assert "tensor<8x53xf32>" in text, "a chunk's logits"
    assert "120x53xf32" not in text and "3x40x53xf32" not in text, "never those of all positions"


def test_targets_and_weights_may_be_numpy_constants_of_a_jitted_function():
    hidden, head, targets, weights = inputs()
    constants = np.asarray(targets), np.asarray(weights)
    got = jax.jit(lambda hidden, head: linear_cross_entropy(hidden, head, *constants))(hidden, head)
    np.testing.assert_allclose(got, linear_cross_entropy(hidden, head, targets, weights), rtol=1e-6)
