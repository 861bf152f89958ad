"""The optimizer: AdamW or Muon from Optax, one learning rate per part of the model.

The parameters are a nested dict whose top level names the *parts* ("vision", "connector", "language"). Whatever parts
the tree holds are trained, so a frozen part is one that is not passed in: it gets no state and cannot move.

Axis letters: P layers stacked by `nn.scan`, D and F widths, V vocabulary.

Every update is `-lr(part, step) * (direction + weight_decay * weight)`: the decay is scaled by the learning rate, like
in AdamW. Muon's direction is scaled to the root mean square that Adam's usually has (`muon_rms`, arXiv 2502.16982), so
one learning rate serves both and a config can change the optimizer alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from alignvlm_jax.config.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig

# A module made by `nn.scan` has this name, and its weights a leading axis, one slice a layer.
STACKED = "layers"
# The first layer sees pixels, not features of the model's width: Adam, as is usual with Muon.
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
    """Linear warm-up to `peak`, then down to `final_fraction * peak` where the stage ends (or flat, if "constant").

    The first step is already non-zero: with w warm-up steps, step i < w has rate peak * (i + 1) / (w + 1).
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
    """The gradient transformation for a tree whose top-level keys are (some of) the parts in `learning_rates`."""
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "adamw":
        steps.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    elif config.name == "muon":
        # A learning rate of -1 undoes the sign that `muon` puts in: the rates per part come below, with the decay.
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
    """Which axes of a weight are the rows and columns of the matrix Muon makes orthogonal; None leaves it to Adam.

    Axes not named are batch axes, so stacked layers are handled one by one:

        vision/layers/mlp_in/kernel   [P, D, F]   rows 1, columns 2
        connector/w1/kernel           [D, F]      rows 0, columns 1
        language/embedding            [V, D]      None: its rows are looked up, a spectral norm says little about them
        language/final_norm/scale     [D]         None
    """
    first = int(STACKED in names)
    if names[-1] == "kernel" and ndim - first == 2 and NEVER_MUON not in names:
        return MuonDimensionNumbers(first, first + 1)
    return None


def is_decayed(names: tuple[str, ...], ndim: int) -> bool:
    """Matrices and tables are decayed; biases and the scales of norms are not, stacked or not."""
    return ndim - int(STACKED in names) >= 2 and names[-1] not in NEVER_DECAYED


def _map_named(rule: Callable[[tuple[str, ...], int], Any]) -> Callable:
    """Lifts a rule on (names on the way down, number of axes) to a function of a parameter tree."""

    def over_tree(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: rule(tuple(str(getattr(key, "key", key)) for key in path), leaf.ndim), params
        )

    return over_tree
