"""Makes the optimizer: AdamW or Muon from Optax, with one learning rate per part of the model.

The parameters are a nested dict whose top level names the *parts* ("vision", "connector", "language"). Every part in
the tree is trained. A frozen part is absent from the tree, so it gets no optimizer state and cannot change.

Axis letters: P layers stacked by `nn.scan`, D and F widths, V vocabulary.

Every update is `-lr(part, step) * (direction + weight_decay * weight)`: the decay is scaled by the learning rate, as in
AdamW. Muon's direction is scaled to the root mean square that Adam's usually has (`muon_rms`, arXiv 2502.16982), so the
same learning rates work for both, and a config can change the optimizer alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from alignvlm_jax.config.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig

# Modules made by `nn.scan` have this name. Their weights have a leading axis with one slice per layer.
STACKED = "layers"
# The first layer takes pixels, not features of the model's width. As is usual with Muon, Adam trains it.
NEVER_MUON = "patch_embedding"
NEVER_DECAYED = ("bias", "scale")


def make_schedule(
    peak: float | Float[Array, ""],
    *,
    steps: int,
    warmup_steps: int = 0,
    kind: str = "cosine",
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Returns a schedule with a linear warm-up to `peak` and a decay to `final_fraction * peak` at the last step.

    With "constant" the rate stays at `peak`. The rate of the first step is not zero: with w warm-up steps, step i < w
    has the rate peak * (i + 1) / (w + 1).
    """
    decay_steps = max(steps - warmup_steps, 1)
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=final_fraction)
    elif kind == "linear":
        after = optax.linear_schedule(peak, peak * final_fraction, decay_steps)
    elif kind == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"schedule {kind!r}: expected one of {', '.join(SCHEDULES)}")
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    config: OptimizerConfig, learning_rates: Mapping[str, float | optax.Schedule]
) -> optax.GradientTransformation:
    """Returns the gradient transformation for a tree whose top-level keys are also keys of `learning_rates`."""
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "adamw":
        steps.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    elif config.name == "muon":
        # `muon` multiplies by minus its learning rate; -1 makes that a factor of 1. The weight decay and the learning
        # rate of each part are applied below.
        steps.append(
            optax.contrib.muon(
                learning_rate=-1.0,
                beta=config.muon_beta,
                eps=config.eps,
                adam_b1=config.b1,
                adam_b2=config.b2,
                consistent_rms=config.muon_rms,
                muon_weight_dimension_numbers=_map_named(muon_dimension_numbers),
            )
        )
    else:
        raise ValueError(f"optimizer {config.name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=_map_named(is_decayed)))
    steps.append(
        optax.partition(
            {part: optax.scale_by_learning_rate(rate) for part, rate in learning_rates.items()},
            lambda params: {part: jax.tree.map(lambda _, p=part: p, tree) for part, tree in params.items()},
        )
    )
    return optax.chain(*steps)


def muon_dimension_numbers(names: tuple[str, ...], ndim: int) -> MuonDimensionNumbers | None:
    """Returns the row and column axes of the matrix that Muon orthogonalizes, or None if Adam trains the weight.

    All other axes are batch axes, so stacked layers are handled one by one:

        vision/layers/mlp_in/kernel   [P, D, F]   rows 1, columns 2
        connector/w1/kernel           [D, F]      rows 0, columns 1
        language/embedding            [V, D]      None: its rows are looked up one by one, not multiplied as a matrix
        language/final_norm/scale     [D]         None
    """
    first = int(STACKED in names)  # axis 0 of stacked layers is the layer
    if names[-1] == "kernel" and ndim - first == 2 and NEVER_MUON not in names:
        return MuonDimensionNumbers(first, first + 1)
    return None


def is_decayed(names: tuple[str, ...], ndim: int) -> bool:
    """Returns whether a weight is decayed: matrices and tables are; biases and the scales of norms are not."""
    return ndim - int(STACKED in names) >= 2 and names[-1] not in NEVER_DECAYED


def _map_named(rule: Callable[[tuple[str, ...], int], Any]) -> Callable:
    """Lifts a rule on (path of a leaf, number of its axes) to a function of a parameter tree."""

    def over_tree(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: rule(tuple(str(getattr(key, "key", key)) for key in path), leaf.ndim), params
        )

    return over_tree
