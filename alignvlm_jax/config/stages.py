"""Settings of a training stage: the parts it trains, its data, its length and its learning rates."""

import dataclasses
from typing import Literal

from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.models.alignvlm import PARTS


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture.

    Attributes:
      dataset: name of a data set under the data root.
      split: a split of the data set, or a part of one in TFDS's notation, "train[:90%]".
      task: kind of conversation to make from a record. "conversation" uses the one that `alignvlm prepare` stored
        in it. For the demo's documents, "transcribe" asks for a transcription of the page, "qa" asks its questions, and
        "mixed" does either; see `data/conversations.py`.
      weight: share of the examples, relative to the other parts of the mixture.
    """

    dataset: str
    split: str = "train"
    task: Literal["conversation", "transcribe", "qa", "mixed"] = "conversation"
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of each part. The rate of a frozen part has no effect."""

    vision: float = 1e-5
    connector: float = 1e-5
    language: float = 1e-5


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Settings of one stage. The paper states no optimizer, schedule or warm-up.

    Attributes:
      name: name in tables, logs and checkpoints.
      mixture: the data sets that it trains on.
      trainable: the parts of the model that it trains. The others are frozen and have no optimizer state.
      steps: length in optimizer steps; None if `epochs` is given.
      epochs: length in passes over the mixture; None if `steps` is given.
      global_batch: number of examples (not bins) per step, over all devices and microbatches. A step has the number of
        microbatches that comes closest, given the average number of examples per bin, which is measured at the start.
      bins_per_step: number of bins per step; replaces `global_batch` if given. It must be a multiple of
        `data.packing.bins_per_microbatch`.
      learning_rates: peak rate of each part.
      schedule: decay of the rate after the warm-up.
      warmup_steps: number of steps of linear warm-up.
      final_lr_fraction: rate at the end of the schedule, as a fraction of the peak.
      optimizer: the optimizer and its constants.
      max_text_tokens: largest number of text tokens of an example, not counting visual tokens. A longer example is
        truncated after the last answer that fits, and refused if none does. The training log counts both.
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
