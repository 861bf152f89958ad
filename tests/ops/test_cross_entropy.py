"""The loss against torch's cross-entropy, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from alignvlm_jax.ops.cross_entropy import weighted_cross_entropy


def test_value_and_gradient_are_those_of_torch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 11)).astype(np.float32) * 4
    targets = rng.integers(0, 11, (3, 5))
    weights = (rng.random((3, 5)) < 0.5).astype(np.float32)

    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        theirs.reshape(15, 11), torch.tensor(targets).reshape(15), reduction="none"
    )
    total = (losses * torch.tensor(weights, dtype=torch.float64).reshape(15)).sum()
    total.backward()

    def ours(logits):
        return weighted_cross_entropy(logits, jnp.asarray(targets), jnp.asarray(weights))

    (loss, weight), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(logits))
    np.testing.assert_allclose(loss, total.item(), rtol=1e-6)
    assert weight == weights.sum()
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(gradient)[weights == 0] == 0)
