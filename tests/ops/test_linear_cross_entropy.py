"""Values and gradients of the loss against PyTorch and the dense form in float64, for several sizes of its loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from alignvlm_jax.ops import linear_cross_entropy
from tests.ops import dense

TOLERANCE = 5e-6
WIDTH, WORDS = 16, 53


def inputs(shape=(3, 40), answer_fraction=0.3, dtype=jnp.float32):
    """Returns hidden states, head, targets and weights. Most weights are 0, and the others differ from each other."""
    rng = np.random.default_rng(0)
    weights = rng.random(shape) * 2 * (rng.random(shape) < answer_fraction)
    hidden, head = rng.normal(size=(*shape, WIDTH)), rng.normal(size=(WORDS, WIDTH))
    targets = rng.integers(0, WORDS, shape)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)


def assert_matches_dense(arguments, z_loss, **options):
    """Asserts that loss, weight and gradients match the dense form in float64."""
    hidden, head, targets, weights = arguments

    def ours(hidden, head):
        loss, weight = linear_cross_entropy(hidden, head, targets, weights, z_loss=z_loss, **options)
        return 3 * loss, weight  # the factor shows whether the incoming cotangent is used

    (loss, weight), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    expected, expected_gradients = dense.in_float64(
        jax.value_and_grad(lambda *a: 3 * dense.linear_cross_entropy(*a, z_loss=z_loss), (0, 1)), *arguments
    )
    np.testing.assert_allclose(loss, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(weight, np.sum(weights), rtol=1e-6)
    for got, reference in zip(gradients, expected_gradients, strict=True):
        assert dense.distance(got, reference) <= TOLERANCE
    unweighted = np.asarray(gradients[0])[np.asarray(weights) == 0]
    assert np.all(unweighted == 0)


# About 36 of 120 positions have a weight. In turn: the default chunk, larger than needed; one chunk that is almost
# full; several chunks, the first two kept; and one chunk for each position, none of them kept.
@pytest.mark.parametrize(
    ("chunk_size", "block_size", "num_kept", "z_loss"),
    [(None, None, 120, 0.0), (40, 20, 120, 0.0), (17, 53, 40, 0.1), (1, 52, 0, 0.1)],
)
def test_values_and_gradients_match_the_dense_form(chunk_size, block_size, num_kept, z_loss):
    options = dict(chunk_size=chunk_size, block_size=block_size, kept_bytes=4 * WORDS * num_kept)
    assert_matches_dense(inputs(), z_loss, **options)


@pytest.mark.parametrize(("answer_fraction", "num_kept"), [(1.0, 48), (0.008, 120)])
def test_all_positions_or_a_single_one_may_have_weight(answer_fraction, num_kept):
    arguments = inputs(answer_fraction=answer_fraction)
    assert np.count_nonzero(arguments[3]) in (1, 120)
    assert_matches_dense(arguments, 0.0, chunk_size=16, kept_bytes=4 * WORDS * num_kept)


@pytest.mark.parametrize(("trained", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_the_logits_are_computed_once_and_only_gradients_of_trained_arrays(trained, products):
    # XLA counts the body of a loop once, so a product is that of one chunk and one block.
    chunk, block, width = 64, 256, 512
    hidden, head = jnp.ones((4 * chunk, width)), jnp.ones((4 * block, width))

    def loss(hidden, head):
        targets, weights = jnp.zeros(len(hidden), int), jnp.ones(len(hidden))
        return linear_cross_entropy(hidden, head, targets, weights, chunk_size=chunk, block_size=block)[0]

    function = jax.value_and_grad(loss, trained) if trained else loss
    flops = jax.jit(function).lower(hidden, head).compile().cost_analysis()["flops"]
    assert 1 <= flops / (2 * chunk * block * width) / products < 1.05, "the rest is exp, sums and comparisons"


def test_confident_positions_keep_their_gradient_in_bfloat16():
    """The gradient of a target's logit, p - 1, is tiny here, and lost if p is rounded before the subtraction."""
    hidden, head, targets, weights = inputs(dtype=jnp.bfloat16)
    hidden += 3 * head[targets]
    gradients = jax.jit(jax.grad(lambda *a: linear_cross_entropy(*a, targets, weights)[0], (0, 1)))(hidden, head)
    expected = dense.in_float64(
        jax.grad(lambda *a: dense.linear_cross_entropy(*a, targets, weights), (0, 1)), hidden, head
    )
    for got, reference in zip(gradients, expected, strict=True):
        assert dense.distance(got, reference) < 0.01


def test_zero_weights_give_zero_loss_and_gradients():
    hidden, head, targets, weights = inputs()
    ours = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1), has_aux=True))
    (loss, weight), gradients = ours(hidden, head, targets, weights * 0)
    assert loss == 0 and weight == 0
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


def test_gradients_match_torch():
    hidden, head, targets, weights = inputs()
    theirs = [torch.tensor(np.asarray(leaf), dtype=torch.float64, requires_grad=True) for leaf in (hidden, head)]
    logits = (theirs[0] @ theirs[1].T).reshape(-1, WORDS)
    flat_targets = torch.tensor(np.asarray(targets, np.int64)).flatten()
    losses = torch.nn.functional.cross_entropy(logits, flat_targets, reduction="none")
    (losses * torch.tensor(np.asarray(weights), dtype=torch.float64).flatten()).sum().backward()
    ours = jax.jit(jax.grad(lambda *a: linear_cross_entropy(*a, targets, weights)[0], (0, 1)))
    for got, reference in zip(ours(hidden, head), theirs, strict=True):
        assert dense.distance(got, reference.grad.numpy()) <= TOLERANCE


def test_bfloat16_is_no_worse_than_the_dense_form_in_bfloat16():
    hidden, head, targets, weights = inputs(dtype=jnp.bfloat16)

    def dense_loss(hidden, head):
        """Rounds the logits and their gradient to bfloat16, as a plain bfloat16 program does."""
        logits = (hidden @ head.T).astype(jnp.float32)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))

    value, expected = dense.in_float64(
        jax.value_and_grad(dense.linear_cross_entropy, (0, 1)), hidden, head, targets, weights
    )
    ours = jax.jit(jax.value_and_grad(lambda *a: linear_cross_entropy(*a, targets, weights)[0], (0, 1)))
    loss, gradients = ours(hidden, head)
    theirs = jax.jit(jax.grad(dense_loss, (0, 1)))(hidden, head)
    np.testing.assert_allclose(loss, value, rtol=1e-3)
    for got, rounded, reference in zip(gradients, theirs, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # 10 % more, because both errors are sums of random roundings.
        assert dense.distance(got, reference) <= 1.1 * dense.distance(rounded, reference)


def test_logits_of_all_positions_are_never_held():
    hidden, head, targets, weights = inputs()
    text = (
        jax.jit(linear_cross_entropy, static_argnames="chunk_size")
        .lower(hidden, head, targets, weights, chunk_size=8)
        .as_text()
    )
    assert "tensor<8x53xf32>" in text, "the logits of one chunk"
    assert "120x53xf32" not in text and "3x40x53xf32" not in text, "the logits of all positions"


def test_targets_and_weights_may_be_numpy_constants_of_a_jitted_function():
    hidden, head, targets, weights = inputs()
    constants = np.asarray(targets), np.asarray(weights)
    got = jax.jit(lambda hidden, head: linear_cross_entropy(hidden, head, *constants))(hidden, head)
    np.testing.assert_allclose(got, linear_cross_entropy(hidden, head, targets, weights), rtol=1e-6)
