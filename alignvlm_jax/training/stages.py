"""Stages as data: what is trainable, on what, for how long and how fast.

The paper's three stages: (1) the full model on captions, which steadies ALIGN; (2) the full model on documents;
(3) the language model and the connector, the vision encoder frozen, on document tasks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax
from jaxtyping import Array, Float

from alignvlm_jax.models.alignvlm import PARTS
from alignvlm_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture.

    Attributes:
      dataset: name of a data set under the data root.
      split: which of its splits, or parts of one as TFDS names them, "train[:90%]".
      task: what is made of a record: the conversation it holds ("conversation": what `tools/prepare_data.py` wrote), or
        for the demo's documents a page to be read out ("transcribe"), its questions ("qa"), or either ("mixed"); see
        `data/conversations.py`.
      weight: its share of the examples, relative to the other parts of the mixture.
    """

    dataset: str
    split: str = "train"
    task: Literal["conversation", "transcribe", "qa", "mixed"] = "conversation"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """The peak learning rate of each part; a frozen part's is not looked at."""

    vision: float = 1e-5
    connector: float = 1e-5
    language: float = 1e-5


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage.

    Attributes:
      name: for tables, logs and checkpoints.
      mixture: what it trains on.
      trainable: the parts of the model it trains; the others are frozen, and hold no optimizer state.
      steps: how long, in optimizer steps; or
      epochs: how long, in passes over the mixture. Exactly one of the two is given.
      global_batch: examples (not bins) per step, over all devices and microbatches. A step has the whole microbatches
        that come nearest to it, going by how many examples share a bin on average, which is measured at the start.
      bins_per_step: sets the bins of a step instead; a multiple of `data.packing.bins_per_microbatch`.
      learning_rates: peak rate of each part.
      schedule: how the rate falls after the warm-up.
      warmup_steps: steps of linear warm-up.
      final_lr_fraction: where the schedule ends, as a fraction of the peak.
      optimizer: which, and its constants. Unstated in the paper, as are schedule and warm-up.
      max_text_tokens: text tokens of an example (visual tokens are not counted); a longer one is cut behind the last
        answer that fits, and refused if none does. Both are counted in the training log.
    """

    name: str
    mixture: tuple[MixturePart, ...]
    trainable: tuple[str, ...] = PARTS
    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 512
    bins_per_step: int | None = None
    learning_rates: LearningRates = LearningRates()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_lr_fraction: float = 0.0
    optimizer: OptimizerConfig = OptimizerConfig()
    max_text_tokens: int = 2048


def stage_schedules(
    stage: StageConfig, peaks: Mapping[str, Float[Array, ""]] | None = None
) -> dict[str, optax.Schedule]:
    """Learning rate by step for each trainable part; `stage.steps` must be known. `peaks` stand for the stage's own."""
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
    """The stage's optimizer, for a tree that holds its trainable parts and nothing else."""
    return make_optimizer(stage.optimizer, stage_schedules(stage))


def trainable_params(stage: StageConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parts that move."""
    return {part: params[part] for part in params if part in stage.trainable}


def frozen_params(stage: StageConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parts that do not."""
    return {part: params[part] for part in params if part not in stage.trainable}


def stage_table(stage: StageConfig, params: dict[str, Any]) -> str:
    """What is printed as a stage starts: its parts, how large they are, which are trained and how fast.

    Its steps and their bins must be known by then.

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
