"""When a run is scored while it trains, and on what."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores the weights in training on a few documents, where they lie; training goes on as if nothing had happened.

    Attributes:
      every_steps: how often; None never.
      dataset: a folder under `data.root`; None is the one that the last stage is trained on.
      split: which of its splits.
      limit: ask only the first so many questions; None asks all.
      batch_size: questions decoded at once, rounded up to what the mesh divides.
      max_new_tokens: where an answer that does not end is cut off; it is wrong then.
    """

    every_steps: int | None = None
    dataset: str | None = None
    split: str = "validation"
    limit: int | None = 256
    batch_size: int = 32
    max_new_tokens: int = 32
