"""Settings of the optimizer and the learning-rate schedule."""

import dataclasses

OPTIMIZERS = ("adamw", "muon")


SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What to build. `b1`, `b2`, `eps` are Adam's (with Muon: of the weights that Muon leaves to Adam)."""

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    muon_beta: float = 0.95
    muon_rms: float = 0.2

