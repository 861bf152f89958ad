"""Settings of a training stage: what it trains, on which data, for how long and how fast."""

import dataclasses
from typing import Literal

from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.models.alignvlm import PARTS


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

