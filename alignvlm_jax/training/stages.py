"""Optimizer, schedules and trainable parts of a training stage.

The paper has three stages: (1) the full model on captions, which stabilizes ALIGN; (2) the full model on documents;
(3) the language model and the connector on document tasks, with the vision encoder frozen.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.models.alignvlm import PARTS
from alignvlm_jax.training.optimizer import make_optimizer, make_schedule


def stage_schedules(
    stage: StageConfig, peaks: Mapping[str, Float[Array, ""]] | None = None
) -> dict[str, optax.Schedule]:
    """Returns the learning-rate schedule of each trainable part.

    Args:
      stage: the stage, with its number of steps filled in.
      peaks: peak rates to use instead of the stage's own.
    """
    return {
        part: make_schedule(
            getattr(stage.learning_rates, part) if peaks is None else peaks[part],
            steps=stage.steps,
            warmup_steps=stage.warmup_steps,
            kind=stage.schedule,
            final_fraction=stage.final_lr_fraction,
        )
        for part in stage.trainable
    }


def stage_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """Returns the stage's optimizer, for a tree that holds exactly its trainable parts."""
    return make_optimizer(stage.optimizer, stage_schedules(stage))


def trainable_params(stage: StageConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts that the stage trains."""
    return {part: params[part] for part in params if part in stage.trainable}


def frozen_params(stage: StageConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts that the stage does not train."""
    return {part: params[part] for part in params if part not in stage.trainable}


def stage_table(stage: StageConfig, params: dict[str, Any]) -> str:
    """Returns the table that is printed when a stage starts: the size of each part and its learning rate.

    The stage's numbers of steps and of bins per step must be filled in.

        stage "documents": 150 steps of 16 bins, muon, cosine schedule
        part              parameters              learning rate
        vision               642,816   frozen
        connector            131,840   trained          3.0e-03
        language           1,052,160   trained          1.0e-03
        total              1,826,816   1,184,000 trained
    """
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in PARTS}
    trained = sum(count for part, count in counts.items() if part in stage.trainable)
    lines = [
        f'stage "{stage.name}": {stage.steps} steps of {stage.bins_per_step} bins, '
        f"{stage.optimizer.name}, {stage.schedule} schedule",
        f"{'part':<12}{'parameters':>16}   {'':<8}{'learning rate':>16}",
    ]
    for part, count in counts.items():
        if part in stage.trainable:
            lines.append(f"{part:<12}{count:>16,}   {'trained':<8}{getattr(stage.learning_rates, part):>16.1e}")
        else:
            lines.append(f"{part:<12}{count:>16,}   frozen")
    lines.append(f"{'total':<12}{sum(counts.values()):>16,}   {trained:,} trained")
    return "\n".join(lines)
