"""What every connector returns."""

import flax.struct
from jaxtyping import Array, Float


@flax.struct.dataclass
class ConnectorOutput:
    """Visual tokens, and how undecided their distributions are.

    Attributes:
      tokens: the decoder's inputs.
      entropy: entropy in nats of each token's distribution over words; None where a connector has no such distribution.
    """

    tokens: Float[Array, "B N D"]
    entropy: Float[Array, "B N"] | None = None
