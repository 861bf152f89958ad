"""Settings of the optimizer and the learning-rate schedule."""

import dataclasses

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      name: "adamw" or "muon".
      b1: Adam's decay of the first moment. With Muon, Adam trains the weights that are not matrices.
      b2: Adam's decay of the second moment.
      eps: Adam's epsilon.
      weight_decay: weight decay, scaled by the learning rate.
      clip_norm: largest global norm of the gradients; None does not clip them.
      muon_beta: Muon's momentum.
      muon_rms: root mean square that Muon's updates are scaled to.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    muon_beta: float = 0.95
    muon_rms: float = 0.2
