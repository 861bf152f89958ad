"""Plans the stages of a run: the number of steps, and the number of microbatches per step."""

import dataclasses
from typing import Any

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.parallel import distributed
from alignvlm_jax.training import config_changes
from alignvlm_jax.training.experiment_data import TrainingData


def plan_stages(config: ExperimentConfig, data: TrainingData, checkpointer: Checkpointer) -> list[StagePlan]:
    """Returns the plans of the newest checkpoint, or new ones if there is none or if stages or data have changed."""
    progress = checkpointer.latest()
    stored = checkpointer.data_state(progress) if progress else None
    if stored is not None:
        # Compare with the checkpoint's config, not with config.json: that file already holds an allowed change, even
        # if the run was killed before it could save a checkpoint with new plans.
        changes = config_changes.compare(checkpointer.config(progress), config)
        if not any(change.affects_results and change.key.startswith(("stages", "data")) for change in changes):
            return [_restore(plan) for plan in stored["plans"]]
    plans = [data.plan(index, stage) for index, stage in enumerate(config.stages)]
    # Processes make the same plans only if they all read the same data sets.
    distributed.require_equal({"the data, as measured,": [dataclasses.asdict(plan) for plan in plans]})
    return plans


def _restore(plan: dict[str, Any]) -> StagePlan:
    """Returns a plan from a checkpoint. Before records were grouped, a position of the order was an example."""
    return StagePlan(**{"num_positions" if name == "num_examples" else name: value for name, value in plan.items()})


def planned_stage(config: ExperimentConfig, stage: StageConfig, plan: StagePlan) -> StageConfig:
    """Returns the stage with its number of steps and of bins per step filled in."""
    return dataclasses.replace(stage, steps=plan.steps, epochs=None, bins_per_step=_bins_per_step(config, plan))


def describe_plan(config: ExperimentConfig, plan: StagePlan) -> str:
    """Returns the line about the size of a step that is printed when a stage starts."""
    grouping = {
        "off": "",
        "tree": f", the questions of a page as branches of a tree (at most {config.data.branch_tokens} tokens a bin)",
        "conversation": ", the records of a page as one conversation",
    }
    return (
        f"a step: {plan.microbatches} x {config.data.packing.bins_per_microbatch} bins, about "
        f"{plan.examples_per_bin * _bins_per_step(config, plan):.0f} examples ({plan.examples_per_bin:.2f} a bin)"
        f"{grouping[config.data.group_questions]}"
    )


def _bins_per_step(config: ExperimentConfig, plan: StagePlan) -> int:
    return plan.microbatches * config.data.packing.bins_per_microbatch
