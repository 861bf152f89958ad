"""The complete description of an experiment."""

import dataclasses

from alignvlm_jax.config.run import AnomalyConfig, CheckpointConfig, DebugConfig, EvaluationConfig, ProfileConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class BackbonesConfig:
    """Where the weights come from that stage 1 starts with.

    Attributes:
      vision: a SigLIP folder in Hugging Face layout; "nano" is the one shipped with the package, "nano-transcription"
        the one made without labels per patch, "random" draws weights of the configured shape.
      language: a Llama folder, likewise.
    """

    vision: str = "nano"
    language: str = "nano"


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on.

    `init_from` is a checkpoint whose weights and tokenizer the run starts with, in place of the backbones.
    `tokenizer` is a folder with tokenizer.json and its companions; None stands for the one that the weights come with.
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

