"""Defines `ExperimentConfig`, the root of all settings."""

import dataclasses

from alignvlm_jax.config.run import AnomalyConfig, CheckpointConfig, DebugConfig, EvaluationConfig, ProfileConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class BackbonesConfig:
    """Sources of the weights that stage 1 starts with.

    Attributes:
    Attributes:
      vision: a SigLIP folder in Hugging Face layout, or its name on the Hub (ORGANIZATION/NAME, with or without
        @REVISION; a run records the commit). "nano" is the encoder in the package, "nano-transcription" the one trained
        without a label for each patch. "random" draws weights of the configured shape, and
        "random:siglip-base-patch16-224" weights of that model's shape.
      language: a Llama folder in Hugging Face layout, its name on the Hub, "nano", "random" or "random:llama-3.2-1b".
    """

    vision: str = "nano"
    language: str = "nano"


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that a run depends on.

    Attributes:
      seed: seed of random initial weights and of the order of the data.
      model: the model. Its geometry is that of the backbones or of `init_from`; a config states only what it changes.
      backbones: sources of the first weights.
      init_from: a checkpoint whose weights and tokenizer the run starts with, instead of the backbones.
      tokenizer: a folder, or a model on the Hub, with tokenizer.json and its companion files; None uses the tokenizer
        that belongs to the weights.
      data: data sets, tiling and packing.
      mesh: arrangement of the devices.
      stages: the training stages, in order.
      checkpoint: when to save, and which checkpoints to keep.
      evaluation: when and how to score the weights during training.
      profile: steps to trace.
      anomalies: reaction to skipped updates and to jumps of the loss.
      debug: aids for finding errors.
      log_every_steps: number of steps between two lines of the training log.
    """

    seed: int = 0
    model: AlignVLMConfig = AlignVLMConfig()
    backbones: BackbonesConfig = BackbonesConfig()
    init_from: str | None = None
    tokenizer: str | None = None
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[StageConfig, ...] = ()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    debug: DebugConfig = DebugConfig()
    log_every_steps: int = 10
