"""AdamW and Muon: which weights each trains, one rate per part, and stacked layers updated one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.training.optimizer import is_decayed, make_optimizer, make_schedule, muon_dimension_numbers


def parameters():
    """Returns two parts with two stacked layers (matrix, bias, norm), an embedding table and a plain kernel."""
    shapes = {
        "vision": {
            "patch_embedding": {"kernel": (12, 8)},
            "layers": {"mlp_in": {"kernel": (2, 8, 16), "bias": (2, 16)}, "norm": {"scale": (2, 8)}},
        },
        "language": {"embedding": (11, 8), "out": {"kernel": (8, 8)}},
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)])


def update(config, learning_rates, parameters, gradients):
    optimizer = make_optimizer(config, learning_rates)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(parameters), parameters)
    return updates


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_part_moves_at_its_own_rate(name):
    params = parameters()
    gradients = jax.tree.map(jnp.cos, params)
    slow = update(OptimizerConfig(name), {"vision": 1e-3, "language": 1e-3}, params, gradients)
    fast = update(OptimizerConfig(name), {"vision": 2e-3, "language": 1e-3}, params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), slow["vision"], fast["vision"])
    jax.tree.map(np.testing.assert_array_equal, slow["language"], fast["language"])


def test_weights_move_against_the_gradient():
    params = parameters()
    for name in ("adamw", "muon"):
        updates = update(OptimizerConfig(name), {"vision": 1e-3, "language": 1e-3}, params, params)
        for leaf_update, gradient in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert jnp.vdot(leaf_update, gradient) < 0


def test_muon_orthogonalizes_each_stacked_layer_separately():
    params = parameters()
    gradients = jax.tree.map(jnp.sin, params)
    updates = update(OptimizerConfig("muon"), {"vision": 1.0, "language": 1.0}, params, gradients)
    stacked = updates["vision"]["layers"]["mlp_in"]["kernel"]
    for layer in range(2):
        # The scaling to Adam's root mean square multiplies by sqrt(16) * 0.2; Newton-Schulz stops at 0.7 to 1.2.
        singular_values = np.linalg.svd(stacked[layer], compute_uv=False) / (4 * 0.2)
        assert singular_values.min() > 0.6 and singular_values.max() < 1.3
    # The second layer gets the same update outside of the stack.
    single = {"vision": {"layers": {"mlp_in": {"kernel": params["vision"]["layers"]["mlp_in"]["kernel"][1:]}}}}
    single_gradients = jax.tree.map(jnp.sin, single)
    config = OptimizerConfig("muon", clip_norm=None)  # clipping depends on the norm of the whole tree
    single_updates = update(config, {"vision": 1.0}, single, single_gradients)
    np.testing.assert_allclose(single_updates["vision"]["layers"]["mlp_in"]["kernel"][0], stacked[1], atol=1e-4)


def test_muon_leaves_tables_norms_and_the_first_layer_to_adam():
    names = {
        ("vision", "layers", "mlp_in", "kernel"): (3, True),
        ("vision", "layers", "mlp_in", "bias"): (2, False),
        ("vision", "layers", "norm", "scale"): (2, False),
        ("vision", "patch_embedding", "kernel"): (2, False),
        ("connector", "w1", "kernel"): (2, True),
        ("connector", "w2"): (2, False),
        ("language", "embedding"): (2, False),
        ("language", "lm_head"): (2, False),
    }
    for path, (ndim, with_muon) in names.items():
        assert (muon_dimension_numbers(path, ndim) is not None) == with_muon, path


def test_norms_and_biases_are_not_decayed():
    params = parameters()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = update(OptimizerConfig(weight_decay=0.1), {"vision": 0.5, "language": 0.5}, params, zeros)
    layers = updates["vision"]["layers"]
    assert not layers["mlp_in"]["bias"].any() and not layers["norm"]["scale"].any()
    np.testing.assert_allclose(
        layers["mlp_in"]["kernel"], -0.05 * params["vision"]["layers"]["mlp_in"]["kernel"], rtol=1e-6
    )
    assert is_decayed(("language", "embedding"), 2) and not is_decayed(("vision", "layers", "norm", "scale"), 2)


def test_gradients_are_clipped_over_all_parts_together():
    params = parameters()
    gradients = jax.tree.map(lambda leaf: 100.0 * leaf, params)
    sgd_like = OptimizerConfig(clip_norm=1.0, b1=0.0, b2=0.0, eps=1e4)  # Adam with a large eps is almost linear
    clipped = update(sgd_like, {"vision": 1.0, "language": 1.0}, params, gradients)
    expected = jax.tree.map(lambda leaf: -leaf / optax.tree.norm(gradients) / 1e4, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), clipped, expected)


def test_the_schedule_warms_up_then_decays():
    schedule = make_schedule(1.0, steps=10, warmup_steps=3, final_fraction=0.1)
    rates = [float(schedule(step)) for step in range(11)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    np.testing.assert_allclose(rates[10], 0.1)
    flat = make_schedule(0.5, steps=10, kind="constant")
    assert [float(flat(step)) for step in (0, 9)] == [0.5, 0.5]
